// SPDX-License-Identifier: BSD-3-Clause
// The Chinese tokenizer for Python: arrays to a dictionary, texts to lists of tokens.
#include "wordcount/wordcount_zh_bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/numpy_arrays.h"
#include "wordcount/wordcount_zh.h"

namespace py = pybind11;

namespace fastops {
namespace {

template <class T> using Contiguous = py::array_t<T, py::array::c_style>;

template <class T> Contiguous<T> typed(const py::object& object, const char* name) {
  if (!py::isinstance<Contiguous<T>>(object)) throw py::type_error(std::string(name) + " must be a contiguous array");
  auto array = py::reinterpret_borrow<Contiguous<T>>(object);
  if (array.ndim() != 1) bad_value(std::string(name) + " must have one dimension");
  return array;
}

// The tokens of a text in their order.
struct Pieces {
  struct Piece {
    const unsigned char* begin;
    std::size_t length;
  };
  std::vector<Piece> items;
  bool memory = true;

  void add(const unsigned char* begin, std::size_t length) noexcept {
    try {
      if (memory) items.push_back({begin, length});
    } catch (const std::bad_alloc&) {
      memory = false;
    }
  }
  template <class Make> py::list list(const Make& make) const {
    if (!memory) throw std::bad_alloc();
    py::list found(items.size());
    for (std::size_t i = 0; i < items.size(); ++i) {
      PyObject* const item =
          make(reinterpret_cast<const char*>(items[i].begin), static_cast<Py_ssize_t>(items[i].length));
      if (item == nullptr) throw py::error_already_set();
      PyList_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(i), item);
    }
    return found;
  }
};

// Cuts without the GIL.
Pieces pieces_of(const ZhModel& model, const char* text, Py_ssize_t size) {
  const py::gil_scoped_release release;
  Pieces found;
  ZhWork work;
  const bool cut = zh_cut(model, reinterpret_cast<const unsigned char*>(text), static_cast<std::size_t>(size), work,
                          [&](const unsigned char* begin, std::size_t length) { found.add(begin, length); });
  found.memory = cut && found.memory;
  return found;
}

py::list zh_cut_bytes(const ZhModel& model, const py::bytes& text) {
  char* p;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(text.ptr(), &p, &size) != 0) throw py::error_already_set();
  return pieces_of(model, p, size).list(PyBytes_FromStringAndSize);
}

// Of a str that UTF-8 can hold (no surrogates, else UnicodeEncodeError).
py::list zh_cut_str(const ZhModel& model, const py::str& text) {
  Py_ssize_t size;
  const char* const p = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (p == nullptr) throw py::error_already_set();
  const auto decoded = [](const char* q, Py_ssize_t n) { return PyUnicode_DecodeUTF8(q, n, "strict"); };
  return pieces_of(model, p, size).list(decoded);
}

std::unique_ptr<ZhModel> make_zh_model(const py::bytes& words, const py::object& numbers, const py::object& weights,
                                       const py::object& hmm, const std::vector<std::string>& split) {
  const auto number = typed<std::uint32_t>(numbers, "numbers");
  const auto weight = typed<double>(weights, "weights");
  ZhHmm model{};
  const bool has_hmm = !hmm.is_none();
  if (has_hmm) {
    const auto parts = hmm.cast<py::tuple>();
    if (parts.size() != 3) bad_value("hmm must be None or start, trans, emit");
    const auto start = typed<double>(parts[0], "start"), trans = typed<double>(parts[1], "trans"),
               emit = typed<double>(parts[2], "emit");
    if (start.size() != 4 || trans.size() != 16) bad_value("start and trans must have 4 and 16 elements");
    std::copy_n(start.data(), 4, model.start);
    for (int i = 0; i < 4; ++i) std::copy_n(trans.data() + 4 * i, 4, model.trans[i]);
    model.emit.assign(emit.data(), emit.data() + emit.size());
    model.split = split;
  }
  char* p;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(words.ptr(), &p, &size) != 0) throw py::error_already_set();
  std::vector<double> table(weight.data(), weight.data() + weight.size());
  const std::uint32_t* const first = number.data();
  const auto count = static_cast<std::size_t>(number.size());
  const py::gil_scoped_release release;
  return std::make_unique<ZhModel>(p, static_cast<std::size_t>(size), first, count, std::move(table), has_hmm,
                                   std::move(model));
}

}  // namespace

void bind_wordcount_zh(py::module_& m) {
  py::class_<ZhModel>(m, "ZhModel")
      .def(py::init(&make_zh_model), py::arg("words"), py::arg("numbers"), py::arg("weights"), py::arg("hmm"),
           py::arg("split"))
      .def_property_readonly("nbytes", &ZhModel::bytes)
      .def("cut", &zh_cut_bytes, py::arg("text"))
      .def("cut_str", &zh_cut_str, py::arg("text"));
}

}  // namespace fastops
