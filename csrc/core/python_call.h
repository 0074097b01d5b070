// SPDX-License-Identifier: BSD-3-Clause
// A call of the C interface from Python: without the GIL, with Ctrl-C heard, its status turned into an exception.
#ifndef FASTOPS_CORE_PYTHON_CALL_H
#define FASTOPS_CORE_PYTHON_CALL_H

#include <pthread.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <pybind11/pybind11.h>

#include <new>

#include "fastops/fastops.h"

namespace fastops {

// Lets Python's signal handlers run about every 20 ms, in the one thread that runs them: the process's first. No other
// thread asks for the GIL here, since Python ends daemon threads inside such a request when the interpreter ends.
class Signals {
 public:
  fastops_poll poll() { return {is_first_thread() ? &Signals::check : nullptr, nullptr}; }

 private:
  static int check(void*) noexcept {
    const PyGILState_STATE state = PyGILState_Ensure();
    const int answer = PyErr_CheckSignals();
    PyGILState_Release(state);
    return answer;
  }
  static bool is_first_thread() noexcept {
#if defined(__linux__)
    return syscall(SYS_gettid) == getpid();
#else
    return pthread_main_np() != 0;
#endif
  }
};

// The status of f(poll), run without the GIL.
template <class F> fastops_status unlocked(F&& f, bool polls = true) {
  Signals signals;
  PyThreadState* const state = PyEval_SaveThread();
  const fastops_status status = f(polls ? signals.poll() : fastops_poll{nullptr, nullptr});
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    // The interpreter has ended and unwinds this daemon thread (before Python 3.14). Destructors further up would
    // touch Python's objects, so the thread stays here until the process is gone.
    for (;;) pause();
  }
  return status;
}

inline void raise_unless_ok(fastops_status status) {
  switch (status) {
    case FASTOPS_OK:
      return;
    case FASTOPS_NO_MEMORY:
      throw std::bad_alloc();
    case FASTOPS_INTERRUPTED:
      // Without an error of its own: a signal handler forked, and this is the child.
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "the call ended in a fork by a signal handler");
      throw pybind11::error_already_set();
    default:
      throw pybind11::value_error("arguments do not fit each other");
  }
}

template <class F> void call(F&& f) { raise_unless_ok(unlocked(f)); }

// For work of microseconds: without a poll, whose question for the thread is two system calls.
template <class F> void call_briefly(F&& f) {
  raise_unless_ok(unlocked([&](fastops_poll) { return f(); }, false));
}

}  // namespace fastops
#endif
