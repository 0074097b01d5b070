# SPDX-License-Identifier: BSD-3-Clause
# CPU levels and their flags; fastops_level_sources(...) compiles the same sources once per level.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(FASTOPS_LEVELS v2 v3 v4)
  set(FASTOPS_FLAGS_v2 -march=x86-64-v2)
  set(FASTOPS_FLAGS_v3 -march=x86-64-v3)
  set(FASTOPS_FLAGS_v4 -march=x86-64-v4 -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(FASTOPS_LEVELS neon)
  set(FASTOPS_FLAGS_neon "")
else()
  message(FATAL_ERROR "fastops is written for x86-64 and aarch64, not ${CMAKE_SYSTEM_PROCESSOR}")
endif()

# Instrumented code takes minutes to optimise, and nobody times it.
if(FASTOPS_SANITIZE)
  set(FASTOPS_OPTIMIZE -O1)
  set(CMAKE_CXX_FLAGS_RELEASE -O1)
else()
  set(FASTOPS_OPTIMIZE -O3)
endif()

function(fastops_common_options target)
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc" "${PROJECT_SOURCE_DIR}/csrc/include")
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden
                                             VISIBILITY_INLINES_HIDDEN ON)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-psabi -Wframe-larger-than=8192)
  if(FASTOPS_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(FASTOPS_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=undefined
                                             -fno-omit-frame-pointer -g -Wno-frame-larger-than)
    target_link_options(${target} PRIVATE -fsanitize=address,undefined)
  endif()
endfunction()

# One OBJECT library a level; the names are collected in FASTOPS_LEVEL_OBJECTS.
function(fastops_level_sources)
  foreach(level IN LISTS FASTOPS_LEVELS)
    add_library(fastops_${level} OBJECT ${ARGN})
    fastops_common_options(fastops_${level})
    target_compile_definitions(fastops_${level} PRIVATE FASTOPS_LEVEL=${level})
    # Which products fuse is the source's choice (explicit fma), so that results can be equal; errno and traps unused.
    target_compile_options(fastops_${level} PRIVATE ${FASTOPS_FLAGS_${level}} ${FASTOPS_OPTIMIZE} -fno-math-errno -fno-trapping-math
                                                    -ffp-contract=off -fno-exceptions -fno-rtti)
    # All levels are the same sources, and few of the machines that sanitize run v4: one level of several is instrumented.
    if(FASTOPS_SANITIZE AND level MATCHES "^v[24]$")
      target_compile_options(fastops_${level} PRIVATE -O0 -fno-sanitize=all)
    endif()
    list(APPEND objects $<TARGET_OBJECTS:fastops_${level}>)
  endforeach()
  set(FASTOPS_LEVEL_OBJECTS ${objects} PARENT_SCOPE)
endfunction()
