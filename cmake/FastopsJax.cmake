# SPDX-License-Identifier: BSD-3-Clause
# The module of handlers for XLA, where jaxlib's headers are: FASTOPS_JAX is auto, on, off or the folder of the headers.
set(FASTOPS_JAX auto CACHE STRING "Handlers for jax: auto (where jaxlib can be imported), on, off, or the folder of its headers")

set(FASTOPS_JAX_INCLUDE "")
if(IS_DIRECTORY "${FASTOPS_JAX}")
  set(FASTOPS_JAX_INCLUDE "${FASTOPS_JAX}")
elseif(FASTOPS_JAX MATCHES "^(auto|on|ON|1|true)$")
  # Of the file alone: importing jaxlib takes seconds.
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u, pathlib; s = u.find_spec('jaxlib'); print(pathlib.Path(s.origin).parent / 'include' if s and s.origin else '', end='')"
                  OUTPUT_VARIABLE FASTOPS_JAX_INCLUDE)
elseif(NOT FASTOPS_JAX MATCHES "^(off|OFF|0|false)$")
  message(FATAL_ERROR "FASTOPS_JAX must be auto, on, off or the folder of jaxlib's headers, got ${FASTOPS_JAX}")
endif()

if(EXISTS "${FASTOPS_JAX_INCLUDE}/xla/ffi/api/ffi.h")
  message(STATUS "Handlers for jax: headers in ${FASTOPS_JAX_INCLUDE}")
  pybind11_add_module(_jax MODULE csrc/jax/jax_attention.cpp csrc/jax/jax_mitchell.cpp csrc/jax/jax_module.cpp)
  fastops_common_options(_jax)
  target_include_directories(_jax SYSTEM PRIVATE "${FASTOPS_JAX_INCLUDE}")
  target_link_libraries(_jax PRIVATE libfastops)
  set_target_properties(_jax PROPERTIES INSTALL_RPATH "$ORIGIN/lib")
  install(TARGETS _jax LIBRARY DESTINATION fastops)
elseif(FASTOPS_JAX STREQUAL "auto")
  message(STATUS "Handlers for jax: not built, no jaxlib here; fastops.jax uses callbacks")
elseif(NOT FASTOPS_JAX MATCHES "^(off|OFF|0|false)$")
  message(FATAL_ERROR "FASTOPS_JAX=${FASTOPS_JAX}, but there are no headers of jaxlib: build without isolation beside jaxlib, or "
                      "set FASTOPS_JAX to the folder that jax.ffi.include_dir() names")
endif()
