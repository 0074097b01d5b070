// SPDX-License-Identifier: BSD-3-Clause
// The Python module of handlers: jax registers them with XLA, which then calls them without Python.
#include <pybind11/pybind11.h>

#include <utility>

#include "jax/jax_handlers.h"

namespace py = pybind11;

namespace {

py::dict handlers() {
  constexpr std::pair<const char*, XLA_FFI_Handler*> kHandlers[] = {
      {"fastops_mitchell", &fastops_jax_elementwise},
      {"fastops_mitchell_grad", &fastops_jax_elementwise_grad},
      {"fastops_matmul", &fastops_jax_matmul},
      {"fastops_matmul_grad", &fastops_jax_matmul_grad},
      {"fastops_conv2d", &fastops_jax_conv2d},
      {"fastops_conv2d_grad", &fastops_jax_conv2d_grad},
      {"fastops_linear_attention", &fastops_jax_linear_attention},
      {"fastops_linear_attention_backward", &fastops_jax_linear_attention_backward},
      {"fastops_linear_attention_step", &fastops_jax_linear_attention_step},
      {"fastops_softmax_attention", &fastops_jax_softmax_attention},
      {"fastops_nystrom_attention", &fastops_jax_nystrom_attention},
      {"fastops_nystrom_attention_backward", &fastops_jax_nystrom_attention_backward},
  };
  py::dict found;
  for (const auto& [name, handler] : kHandlers) found[name] = py::capsule(reinterpret_cast<void*>(handler));
  return found;
}

}  // namespace

PYBIND11_MODULE(_jax, m, py::mod_gil_not_used()) {
  m.attr("api_version") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("handlers", &handlers,
        "The handlers by the names of their targets, as jax.ffi.register_ffi_target takes them.");
}
