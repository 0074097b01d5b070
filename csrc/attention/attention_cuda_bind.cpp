// SPDX-License-Identifier: BSD-3-Clause
// Linear and Nystrom attention on a GPU for Python: arrays as (address, strides of the batch, head, row, column), and
// its workspace.
#include <initializer_list>
#include <new>
#include <string>
#include <utility>

#include "cuda/cuda_bind.h"

namespace py = pybind11;

namespace fastops::gpu {
namespace {

constexpr std::size_t kItem[] = {2, 2, 4, 8};

// Null where there is none.
Heads heads_of(const py::dict& arrays, const char* name, std::size_t item) {
  Heads x{};
  if (!arrays.contains(name)) return x;
  const py::tuple given = arrays[name].cast<py::tuple>();
  if (given.size() != 5) throw py::value_error("arrays must be (address, batch strides, head, row, column)");
  x.data = reinterpret_cast<const void*>(given[0].cast<std::uintptr_t>());
  want_aligned(x.data, item, name);
  const py::tuple batch = given[1].cast<py::tuple>();
  if (batch.size() != kBatchDimensions) throw py::value_error("arrays must have four strides of the batch");
  for (std::size_t d = 0; d < kBatchDimensions; ++d) x.batch[d] = batch[d].cast<std::ptrdiff_t>();
  x.head = given[2].cast<std::ptrdiff_t>();
  x.row = given[3].cast<std::ptrdiff_t>();
  x.col = given[4].cast<std::ptrdiff_t>();
  // 16 bytes are loaded at once: 8 halves, or a half of 8 floats.
  const auto step = static_cast<std::ptrdiff_t>(16 / item);
  x.packs = x.col == 1 && reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.head % step == 0 && x.row % step == 0;
  for (const std::ptrdiff_t stride : x.batch) x.packs = x.packs && stride % step == 0;
  return x;
}
void* address_of(const py::dict& arrays, const char* name, std::size_t item) {
  if (!arrays.contains(name)) return nullptr;
  void* const p = reinterpret_cast<void*>(arrays[name].cast<std::uintptr_t>());
  want_aligned(p, item, name);
  return p;
}
LinearState state_of(const py::dict& arrays, const char* name) {
  LinearState state{};
  if (!arrays.contains(name)) return state;
  const py::tuple given = arrays[name].cast<py::tuple>();
  float** const parts[] = {&state.s, &state.z, &state.m};
  for (std::size_t i = 0; i < given.size() && i < 3; ++i) {
    *parts[i] = reinterpret_cast<float*>(given[i].cast<std::uintptr_t>());
    want_aligned(*parts[i], sizeof(float), std::string(name) + "[" + std::to_string(i) + "]");
  }
  return state;
}

// What linear and Nystrom attention share: the first of the options, all but the last two of the sizes, and the rows of
// heads.
template <class Call> Call begin_call(const py::tuple& options, const py::tuple& sizes, const py::dict& arrays) {
  Call call{};
  if (options.size() != 8 || sizes.size() != kBatchDimensions + 8)
    throw py::value_error("options or sizes of the wrong length");
  const int dtype = options[0].cast<int>();
  if (dtype < FASTOPS_F16 || dtype > FASTOPS_F32) throw py::type_error("arrays must be of 2 or 4 bytes");
  call.dtype = static_cast<fastops_dtype>(dtype);
  for (std::size_t d = 0; d < kBatchDimensions; ++d) call.batch[d] = sizes[d].cast<std::size_t>();
  std::size_t* const numbers[] = {&call.heads_q, &call.heads_kv, &call.queries, &call.keys, &call.dim, &call.values};
  for (std::size_t i = 0; i < 6; ++i) *numbers[i] = sizes[kBatchDimensions + i].cast<std::size_t>();
  if (call.dim == 0 || call.values == 0) throw py::value_error("sizes of rows must be at least 1");
  if (call.queries > kMostTokens || call.keys > kMostTokens || call.dim > kMostNumbers || call.values > kMostNumbers)
    throw py::value_error("rows must be at most 2**30, of at most 2**20 numbers");
  if (call.heads_kv == 0 ? call.heads_q != 0 : call.heads_q % call.heads_kv != 0)
    throw py::value_error("heads must be a multiple of those of k and v");
  const std::pair<const char*, Heads*> rows[] = {{"q", &call.q},     {"k", &call.k},   {"v", &call.v},
                                                 {"out", &call.out}, {"dy", &call.dy}, {"dq", &call.dq},
                                                 {"dk", &call.dk},   {"dv", &call.dv}};
  for (const auto& [name, x] : rows) *x = heads_of(arrays, name, kItem[dtype]);
  call.mask = heads_of(arrays, "key_mask", 1);
  return call;
}
void want_arrays(const py::dict& arrays, std::initializer_list<const char*> names) {
  for (const char* name : names)
    if (!arrays.contains(name)) throw py::value_error(std::string("a call needs ") + name);
}
// With a workspace of so many bytes.
template <class Call>
void launch(const Call& call, Status (*run)(const Call&, void*, Stream) noexcept, std::size_t bytes, int device,
            std::uintptr_t stream) {
  const Launching on(device);
  const Workspace workspace(bytes, device, stream);
  raise_unless_ok(run(call, workspace.data(), stream_of(stream)));
}

LinearAttention linear_of(const py::tuple& options, const py::tuple& sizes, const py::dict& arrays) {
  auto call = begin_call<LinearAttention>(options, sizes, arrays);
  call.map = static_cast<fastops_feature_map>(options[1].cast<int>());
  if (call.map < FASTOPS_MAP_ELU || call.map > FASTOPS_MAP_SOFTMAX) throw py::value_error("a map that is not here");
  call.causal = options[2].cast<bool>();
  call.normalize = options[3].cast<bool>();
  call.eps = options[4].cast<float>();
  call.kernel_eps = options[5].cast<float>();
  call.scale = options[6].cast<float>();
  call.tf32 = options[7].cast<bool>();
  call.features = sizes[kBatchDimensions + 6].cast<std::size_t>();
  call.sequences = sizes[kBatchDimensions + 7].cast<std::size_t>();
  if (call.features == 0 || call.features > kMostNumbers)
    throw py::value_error("features must be at least 1 and at most 2**20");
  call.y = heads_of(arrays, "y", kItem[call.dtype]);
  call.decay_dtype = static_cast<fastops_dtype>(arrays.contains("decay_dtype") ? arrays["decay_dtype"].cast<int>() : 2);
  if (call.decay_dtype < FASTOPS_F16 || call.decay_dtype > FASTOPS_F64) throw py::type_error("decay must be of floats");
  call.decay = heads_of(arrays, "decay", kItem[call.decay_dtype]);
  const int projection = arrays.contains("projection_dtype") ? arrays["projection_dtype"].cast<int>() : FASTOPS_F32;
  if (projection < FASTOPS_F16 || projection > FASTOPS_F64) throw py::type_error("projection must be of floats");
  call.projection_dtype = static_cast<fastops_dtype>(projection);
  call.projection = address_of(arrays, "projection", kItem[projection]);
  if (call.map == FASTOPS_MAP_FAVOR ? call.projection == nullptr : call.features < call.dim)
    throw py::value_error("features must fit the map");
  if (call.map >= FASTOPS_MAP_EXP && call.decay.data != nullptr)
    throw py::value_error("exponential maps have no decay");
  call.wide_offsets = arrays.contains("wide_offsets") && arrays["wide_offsets"].cast<bool>();
  call.offsets = address_of(arrays, "cu_seqlens", call.wide_offsets ? 8 : 4);
  call.initial = state_of(arrays, "initial_state");
  call.final = state_of(arrays, "final_state");
  call.d_final = state_of(arrays, "d_state");
  call.d_initial = state_of(arrays, "d_initial_state");
  return call;
}

void attend(const py::tuple& options, const py::tuple& sizes, const py::dict& arrays, bool gradient, int device,
            std::uintptr_t stream) {
  const LinearAttention call = linear_of(options, sizes, arrays);
  if (gradient) want_arrays(arrays, {"dy", "y", "dq", "dk", "dv"});
  launch(call, gradient ? &linear_attention_backward : &linear_attention, linear_attention_workspace(call, gradient),
         device, stream);
}
void step(const py::tuple& options, const py::tuple& sizes, const py::dict& arrays, int device, std::uintptr_t stream) {
  const LinearAttention call = linear_of(options, sizes, arrays);
  if (call.final.s == nullptr || call.queries != 1 || call.keys != 1)
    throw py::value_error("a step needs one token and its state");
  const Launching on(device);
  raise_unless_ok(linear_attention_step(call, stream_of(stream)));
}
NystromAttention nystrom_of(const py::tuple& options, const py::tuple& sizes, const py::dict& arrays) {
  auto call = begin_call<NystromAttention>(options, sizes, arrays);
  call.iterations = options[1].cast<std::size_t>();
  call.ridge_solve = options[2].cast<bool>();
  call.ridge = options[3].cast<double>();
  call.scale = options[4].cast<double>();
  call.batch_init = options[5].cast<bool>();
  call.normalize = options[6].cast<bool>();
  call.tf32 = options[7].cast<bool>();
  call.landmarks = sizes[kBatchDimensions + 6].cast<std::size_t>();
  call.taps = sizes[kBatchDimensions + 7].cast<std::size_t>();
  if (call.landmarks == 0 || call.landmarks > kMostLandmarks) throw py::value_error("landmarks must be 1 to 4096");
  if (call.taps > kMostTokens) throw py::value_error("taps must be at most 2**30");
  // Floats of any size in C order.
  const auto given = [&](const char* name, fastops_dtype* of) -> const void* {
    if (!arrays.contains(name)) return nullptr;
    const py::tuple pair = arrays[name].cast<py::tuple>();
    const int code = pair[1].cast<int>();
    if (code < FASTOPS_F16 || code > FASTOPS_F64) throw py::type_error("arrays must be of floats");
    *of = static_cast<fastops_dtype>(code);
    const auto* const p = reinterpret_cast<const void*>(pair[0].cast<std::uintptr_t>());
    want_aligned(p, kItem[code], name);
    return p;
  };
  call.conv = given("conv_weight", &call.conv_dtype);
  call.q_landmarks = given("landmarks[0]", &call.q_landmarks_dtype);
  call.k_landmarks = given("landmarks[1]", &call.k_landmarks_dtype);
  if ((call.q_landmarks == nullptr) != (call.k_landmarks == nullptr))
    throw py::value_error("landmarks must be given of q and of k");
  if (call.conv != nullptr && (call.taps % 2 == 0 || call.queries != call.keys))
    throw py::value_error("a convolution must have an odd number of taps, and as many queries as keys");
  const char* const told[] = {"residual", "coefficient", "row_sum_min", "row_sum_max"};
  for (std::size_t i = 0; i < 4; ++i) call.info[i] = static_cast<float*>(address_of(arrays, told[i], sizeof(float)));
  call.d_conv = static_cast<float*>(address_of(arrays, "d_conv_weight", sizeof(float)));
  call.d_q_landmarks = static_cast<float*>(address_of(arrays, "d_landmarks[0]", sizeof(float)));
  call.d_k_landmarks = static_cast<float*>(address_of(arrays, "d_landmarks[1]", sizeof(float)));
  return call;
}
void attend_through_landmarks(const py::tuple& options, const py::tuple& sizes, const py::dict& arrays, bool gradient,
                              int device, std::uintptr_t stream) {
  const NystromAttention call = nystrom_of(options, sizes, arrays);
  if (gradient) {
    // Every step's matrices are kept; how many steps there are is the caller's to say.
    double bytes = 8.0 * static_cast<double>(call.iterations + 16) * static_cast<double>(call.heads_q) *
                   static_cast<double>(call.landmarks * call.landmarks);
    for (const std::size_t n : call.batch) bytes *= static_cast<double>(n);
    if (bytes > 0x1p60) throw std::bad_alloc();
    want_arrays(arrays, {"dy", "dq", "dk", "dv"});
    if ((call.conv == nullptr) != (call.d_conv == nullptr))
      throw py::value_error("a convolution needs room for its gradient");
  } else {
    want_arrays(arrays, {"out"});
  }
  launch(call, gradient ? &nystrom_attention_backward : &nystrom_attention, nystrom_attention_workspace(call, gradient),
         device, stream);
}
std::shared_ptr<ArrayMemory> copied_up(const py::bytes& from, int device, std::uintptr_t stream) {
  const std::string contents = from;
  const Launching on(device);
  const auto made = std::make_shared<ArrayMemory>(contents.size(), device, stream);
  raise_unless_ok(upload(made->data(), contents.data(), contents.size(), stream_of(stream)));
  return made;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("linear_attention", &attend, py::arg("options"), py::arg("sizes"), py::arg("arrays"), py::arg("gradient"),
        py::arg("device"), py::arg("stream"));
  m.def("linear_attention_step", &step, py::arg("options"), py::arg("sizes"), py::arg("arrays"), py::arg("device"),
        py::arg("stream"));
  m.def("nystrom_attention", &attend_through_landmarks, py::arg("options"), py::arg("sizes"), py::arg("arrays"),
        py::arg("gradient"), py::arg("device"), py::arg("stream"));
  m.def("uploaded", &copied_up, py::arg("contents"), py::arg("device"), py::arg("stream"),
        "Memory with a copy of the host's, which does not wait for the stream.");
  m.attr("most_step_features") = kMostStepFeatures;
}

}  // namespace fastops::gpu
