// SPDX-License-Identifier: BSD-3-Clause
// The Python module: the library's own settings, then each family's functions.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "attention/attention_bind.h"
#include "core/cpuid.h"
#include "fastops/fastops.h"
#include "mitchell/mitchell_bind.h"
#include "optim/optim_bind.h"
#include "wordcount/wordcount_bind.h"
#include "wordcount/wordcount_zh_bind.h"

namespace py = pybind11;

namespace {

py::list compiled_targets() {
  py::list names;
  for (int i = 0; const char* name = fastops_compiled_target(i); ++i) names.append(name);
  return names;
}

py::list targets() {
  py::list names;
  for (int i = 0; const char* name = fastops_compiled_target(i); ++i)
    if (fastops_target_runs(name) == 1) names.append(name);
  return names;
}

void set_target(const std::string& name) {
  const fastops_status status = fastops_set_target(name.c_str());
  if (status == FASTOPS_OK) return;
  std::string text = status == FASTOPS_INVALID ? "unknown target '" + name + "'"
                                               : "target '" + name + "' is not supported by this CPU";
  throw py::value_error(text + "; choose from " + py::str(targets()).cast<std::string>());
}

void set_num_threads(unsigned count) {
  if (fastops_set_num_threads(count) != FASTOPS_OK)
    throw py::value_error("n must be in 1 .. 1024, got " + std::to_string(count));
}

py::dict cpu_info() {
  py::dict info;
#if defined(__x86_64__)
  unsigned regs[4] = {0, 0, 0, 0};
  char brand[49] = {};
  for (unsigned i = 0; i < 3; ++i)
    if (__get_cpuid(0x80000002u + i, &regs[0], &regs[1], &regs[2], &regs[3])) std::memcpy(brand + 16 * i, regs, 16);
  info["architecture"] = "x86_64";
  info["brand"] = std::string(brand[0] ? brand : "unnamed x86-64");
  info["level"] = fastops_x86_level();
#else
  info["architecture"] = "aarch64";
  info["brand"] = "aarch64";
  info["level"] = 1;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of fastops.";
  m.def("abi_version", &fastops_abi_version);
  m.def("compiled_targets", &compiled_targets);
  m.def("targets", &targets);
  m.def("get_target", [] { return std::string(fastops_get_target()); });
  m.def("set_target", &set_target, py::arg("name"));
  m.def("get_num_threads", &fastops_get_num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("default_num_threads", &fastops_default_num_threads);
  m.def("cpu_info", &cpu_info);
  fastops::bind_mitchell(m);
  fastops::bind_optim(m);
  fastops::bind_optim_torch(m);
  fastops::bind_attention(m);
  fastops::bind_wordcount(m);
  fastops::bind_wordcount_zh(m);
}
