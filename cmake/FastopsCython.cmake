# SPDX-License-Identifier: BSD-3-Clause
# fastops.cyfastops: the C functions that other Cython modules cimport; linked to libfastops as _core is.
set(source "${PROJECT_SOURCE_DIR}/fastops/cyfastops.pyx")
set(generated "${PROJECT_BINARY_DIR}/cyfastops.cpp")
add_custom_command(
  OUTPUT "${generated}"
  COMMAND Python::Interpreter -m cython -3 --cplus "${source}" --output-file "${generated}" --working "${PROJECT_SOURCE_DIR}"
  DEPENDS "${source}" "${PROJECT_SOURCE_DIR}/fastops/cyfastops.pxd"
  COMMENT "Translating cyfastops.pyx"
  VERBATIM)
python_add_library(cyfastops MODULE WITH_SOABI "${generated}")
target_include_directories(cyfastops PRIVATE "${PROJECT_SOURCE_DIR}/csrc/include")
set_target_properties(cyfastops PROPERTIES CXX_VISIBILITY_PRESET hidden INSTALL_RPATH "$ORIGIN/lib")
target_link_libraries(cyfastops PRIVATE libfastops)
install(TARGETS cyfastops LIBRARY DESTINATION fastops)
