# SPDX-License-Identifier: BSD-3-Clause
# What other projects link to: headers, libraries and the CMake package, in the folder of the Python package.
include(CMakePackageConfigHelpers)

set(targets libfastops)
if(FASTOPS_STATIC_LIBRARY)
  list(APPEND targets libfastops_static)
endif()
# Relative to the folder that the package's folder lies in.
install(TARGETS ${targets} EXPORT fastopsTargets LIBRARY DESTINATION fastops/lib ARCHIVE DESTINATION fastops/lib
        INCLUDES DESTINATION fastops/include)
install(DIRECTORY csrc/include/fastops DESTINATION fastops/include)
set(folder fastops/share/cmake/fastops)
install(EXPORT fastopsTargets NAMESPACE fastops:: DESTINATION ${folder})
configure_package_config_file(cmake/fastopsConfig.cmake.in "${PROJECT_BINARY_DIR}/fastopsConfig.cmake"
                              INSTALL_DESTINATION ${folder} NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/fastopsConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/fastopsConfig.cmake" "${PROJECT_BINARY_DIR}/fastopsConfigVersion.cmake"
        DESTINATION ${folder})
