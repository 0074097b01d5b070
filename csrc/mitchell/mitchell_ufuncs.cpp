// SPDX-License-Identifier: BSD-3-Clause
// Mitchell arithmetic as NumPy ufuncs; NumPy's C API only.
#include "mitchell/mitchell_ufuncs.h"

#include <cstdlib>
#include <cstring>

#define PY_ARRAY_UNIQUE_SYMBOL fastops_mitchell_array_api
#define PY_UFUNC_UNIQUE_SYMBOL fastops_mitchell_ufunc_api
#include <numpy/arrayobject.h>
#include <numpy/ufuncobject.h>

namespace fastops {
namespace {

constexpr const char* kOps[] = {"mul", "div", "square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2"};

// What a loop knows beside its arrays.
struct LoopData {
  const fastops_mitchell* m;
  fastops_mitchell_op op;
  fastops_dtype dtype;
};

void binary_loop(char** args, const npy_intp* dimensions, const npy_intp* steps, void* data) {
  const auto& d = *static_cast<const LoopData*>(data);
  fastops_mitchell_apply(d.m, d.op, d.dtype, args[0], steps[0], args[1], steps[1], args[2], steps[2],
                         static_cast<std::size_t>(dimensions[0]));
}
void unary_loop(char** args, const npy_intp* dimensions, const npy_intp* steps, void* data) {
  const auto& d = *static_cast<const LoopData*>(data);
  fastops_mitchell_apply(d.m, d.op, d.dtype, args[0], steps[0], args[0], steps[0], args[1], steps[1],
                         static_cast<std::size_t>(dimensions[0]));
}

struct LoopType {
  int operand, result;
  fastops_dtype dtype;
};
static_assert(sizeof(long) == 8, "the product of two 32-bit integers is a long");
// In NumPy's order, which is that of its search. Integers come first and are left out where an operation has none.
constexpr LoopType kLoops[] = {{NPY_BYTE, NPY_SHORT, FASTOPS_I8},         {NPY_UBYTE, NPY_USHORT, FASTOPS_U8},
                               {NPY_SHORT, NPY_INT, FASTOPS_I16},         {NPY_USHORT, NPY_UINT, FASTOPS_U16},
                               {NPY_INT, NPY_LONG, FASTOPS_I32},          {NPY_UINT, NPY_ULONG, FASTOPS_U32},
                               {NPY_LONG, NPY_LONG, FASTOPS_I64},         {NPY_ULONG, NPY_ULONG, FASTOPS_U64},
                               {NPY_LONGLONG, NPY_LONGLONG, FASTOPS_I64}, {NPY_ULONGLONG, NPY_ULONGLONG, FASTOPS_U64},
                               {NPY_HALF, NPY_HALF, FASTOPS_F16},         {NPY_FLOAT, NPY_FLOAT, FASTOPS_F32},
                               {NPY_DOUBLE, NPY_DOUBLE, FASTOPS_F64}};
constexpr int kLoopCount = sizeof(kLoops) / sizeof(kLoops[0]);
constexpr int kIntegerLoops = 10;

// All of one ufunc, in one allocation that lives as long as the process.
struct UfuncData {
  LoopData loops[kLoopCount + 1];
  void* data[kLoopCount];
  PyUFuncGenericFunction functions[kLoopCount];
  char types[3 * kLoopCount];
  UfuncData* next;
  PyObject* ufunc;
};

UfuncData* g_ufuncs = nullptr;  // guarded by the GIL, or by g_lock without one
int g_bfloat16 = -1;
#ifdef Py_GIL_DISABLED
PyMutex g_lock;
struct Guard {
  Guard() { PyMutex_Lock(&g_lock); }
  ~Guard() { PyMutex_Unlock(&g_lock); }
};
#else
struct Guard {
  Guard() {}
};
#endif

bool import_numpy() {
  if (PyArray_API != nullptr && PyUFunc_API != nullptr) return true;
  if (_import_array() < 0) return false;
  return _import_umath() >= 0;
}

bool add_bfloat16(UfuncData* u) {
  auto* ufunc = reinterpret_cast<PyUFuncObject*>(u->ufunc);
  const int types[3] = {g_bfloat16, g_bfloat16, g_bfloat16};
  return PyUFunc_RegisterLoopForType(ufunc, g_bfloat16, ufunc->nin == 2 ? binary_loop : unary_loop, types,
                                     &u->loops[kLoopCount]) >= 0;
}

}  // namespace

int parse_spec(PyObject* spec, fastops_mitchell_params* params) {
  int form, flush, corrections, mantissa_bits, segments;
  double c;
  PyObject* table;
  std::memset(params, 0, sizeof *params);
  if (!PyTuple_Check(spec)) {
    PyErr_SetString(PyExc_TypeError,
                    "spec must be a tuple (form, flush, corrections, mantissa_bits, segments, c, table)");
    return -1;
  }
  if (!PyArg_ParseTuple(spec, "iiiiidO!;spec must be (form, flush, corrections, mantissa_bits, segments, c, table)",
                        &form, &flush, &corrections, &mantissa_bits, &segments, &c, &PyTuple_Type, &table))
    return -1;
  const Py_ssize_t entries = PyTuple_GET_SIZE(table);
  if (segments < 0 || segments > 16 ||
      (entries != segments && entries != static_cast<Py_ssize_t>(segments) * segments)) {
    PyErr_Format(PyExc_ValueError, "spec's table must have segments or segments^2 entries, got %zd for %d segments",
                 entries, segments);
    return -1;
  }
  params->form = form;
  params->flush = flush;
  params->corrections = corrections;
  params->mantissa_bits = mantissa_bits;
  params->segments = segments;
  params->c = c;
  for (Py_ssize_t i = 0; i < entries; ++i) {
    params->table[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(table, i));
    if (params->table[i] == -1.0 && PyErr_Occurred()) return -1;
  }
  return 0;
}

PyObject* make_ufunc(const char* op_name, const char* name, const char* doc, PyObject* spec) {
  if (!import_numpy()) return nullptr;
  int op = 0;
  constexpr int ops = sizeof(kOps) / sizeof(kOps[0]);
  while (op < ops && std::strcmp(kOps[op], op_name) != 0) ++op;
  if (op == ops)
    return PyErr_Format(PyExc_ValueError,
                        "op must be one of mul, div, square, reciprocal, sqrt, rsqrt, log2, exp2, got '%.40s'",
                        op_name);
  fastops_mitchell_params params;
  if (parse_spec(spec, &params) < 0) return nullptr;
  const bool binary = op <= FASTOPS_DIV, integers = op == FASTOPS_MUL || op == FASTOPS_SQUARE;
  if (params.form != FASTOPS_FORM_LOG && !integers)
    return PyErr_Format(PyExc_ValueError, "spec's form must be 0 for %s, got %d", op_name,
                        static_cast<int>(params.form));
  fastops_mitchell* m = nullptr;
  switch (fastops_mitchell_create(&params, &m)) {
    case FASTOPS_OK:
      break;
    case FASTOPS_NO_MEMORY:
      return PyErr_NoMemory();
    default:
      PyErr_SetString(PyExc_ValueError,
                      "spec must describe a multiplier: form 0 .. 2, |c| < 0.5, segments 0, 2, 4, 8 or 16");
      return nullptr;
  }
  const std::size_t name_size = std::strlen(name) + 1, doc_size = std::strlen(doc) + 1;
  auto* u = static_cast<UfuncData*>(std::calloc(1, sizeof(UfuncData) + name_size + doc_size));
  if (u == nullptr) {
    fastops_mitchell_destroy(m);
    return PyErr_NoMemory();
  }
  char* own_name = reinterpret_cast<char*>(u + 1);
  char* own_doc = own_name + name_size;
  std::memcpy(own_name, name, name_size);
  std::memcpy(own_doc, doc, doc_size);
  int count = 0;
  char* types = u->types;
  for (int i = integers ? 0 : kIntegerLoops; i < kLoopCount; ++i, ++count) {
    u->loops[count] = {m, static_cast<fastops_mitchell_op>(op), kLoops[i].dtype};
    u->data[count] = &u->loops[count];
    u->functions[count] = binary ? binary_loop : unary_loop;
    *types++ = static_cast<char>(kLoops[i].operand);
    if (binary) *types++ = static_cast<char>(kLoops[i].operand);
    *types++ = static_cast<char>(kLoops[i].result);
  }
  u->loops[kLoopCount] = {m, static_cast<fastops_mitchell_op>(op), FASTOPS_BF16};
  // One is neutral only where nothing shifts the sum of the logarithms and nothing is cut off the operands.
  const bool neutral = params.c == 0 && params.segments == 0 && params.mantissa_bits == 0 && params.flush == 0;
  const int identity = op == FASTOPS_MUL && neutral ? PyUFunc_One : PyUFunc_None;
  u->ufunc = PyUFunc_FromFuncAndData(u->functions, u->data, u->types, count, binary ? 2 : 1, 1, identity, own_name,
                                     own_doc, 0);
  if (u->ufunc == nullptr) {
    fastops_mitchell_destroy(m);
    std::free(u);
    return nullptr;
  }
  Guard guard;
  if (g_bfloat16 >= 0 && !add_bfloat16(u)) {
    Py_DECREF(u->ufunc);  // its data stays: NumPy may have kept a pointer to it
    return nullptr;
  }
  Py_INCREF(u->ufunc);
  u->next = g_ufuncs;
  g_ufuncs = u;
  return u->ufunc;
}

bool apply_ufunc(PyObject* ufunc, fastops_dtype dtype, const void* a, const void* b, void* out, std::size_t n) {
  if (!import_numpy()) {
    PyErr_Clear();
    return false;
  }
  if (!PyObject_TypeCheck(ufunc, &PyUFunc_Type)) return false;
  const auto* const u = reinterpret_cast<PyUFuncObject*>(ufunc);
  if (u->ntypes == 0 || u->functions[0] != binary_loop) return false;
  const LoopData* const loops = static_cast<const UfuncData*>(u->data[0])->loops;
  const LoopData* found = dtype == FASTOPS_BF16 ? loops + kLoopCount : nullptr;
  for (int i = 0; i < u->ntypes; ++i)
    if (loops[i].dtype == dtype) found = loops + i;
  if (found == nullptr) return false;
  fastops_mitchell_op op = found->op;
  const auto item = static_cast<std::ptrdiff_t>(dtype == FASTOPS_F64 ? 8 : dtype == FASTOPS_F32 ? 4 : 2);
  const auto apply = [&] {
    fastops_mitchell_apply(found->m, op, dtype, static_cast<const char*>(a), item, static_cast<const char*>(b), item,
                           static_cast<char*>(out), item, n);
  };
  constexpr std::size_t kBrief = 10000;
  if (n < kBrief) {
    apply();
  } else {
    Py_BEGIN_ALLOW_THREADS;
    apply();
    Py_END_ALLOW_THREADS;
  }
  return true;
}

PyObject* register_bfloat16(PyObject* type) {
  if (!import_numpy()) return nullptr;
  PyArray_Descr* descr = nullptr;
  if (!PyArray_DescrConverter(type, &descr)) return nullptr;
  const int number = descr->type_num;
  const npy_intp size = PyDataType_ELSIZE(descr);
  Py_DECREF(descr);
  if (number < NPY_USERDEF || size != 2) {
    PyErr_SetString(PyExc_TypeError,
                    "type must be a bfloat16 scalar type registered with NumPy, such as ml_dtypes.bfloat16");
    return nullptr;
  }
  Guard guard;
  if (g_bfloat16 == number) Py_RETURN_NONE;
  g_bfloat16 = number;
  for (UfuncData* u = g_ufuncs; u != nullptr; u = u->next)
    if (!add_bfloat16(u)) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace fastops
