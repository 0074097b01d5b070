# SPDX-License-Identifier: BSD-3-Clause
# The module behind fastops.cuda, where nvcc is: FASTOPS_CUDA is auto, on or off. It needs neither a driver nor a GPU to be built or
# imported, and no library of CUDA to run. A family adds its .cu file and its bindings to the two lists.
set(FASTOPS_CUDA auto CACHE STRING "Kernels for NVIDIA GPUs: auto (where nvcc is found), on or off")
set(FASTOPS_CUDA_ARCHITECTURES "80-real;90-real;100-real;120" CACHE STRING "GPUs to compile for: Ampere, Hopper, both Blackwells; PTX of the last for later ones")
set(FASTOPS_CUDA_KERNELS csrc/attention/attention_linear.cu csrc/attention/attention_nystrom.cu csrc/mitchell/mitchell.cu csrc/mitchell/mitchell_depthwise.cu csrc/mitchell/mitchell_gathered.cu csrc/mitchell/mitchell_grad.cu csrc/mitchell/mitchell_matmul.cu csrc/optim/optim.cu)
set(FASTOPS_CUDA_BINDINGS csrc/cuda/cuda_bind.cpp csrc/attention/attention_cuda_bind.cpp csrc/mitchell/mitchell_cuda_bind.cpp csrc/optim/optim_cuda_bind.cpp)
list(TRANSFORM FASTOPS_CUDA_KERNELS PREPEND "${PROJECT_SOURCE_DIR}/")
list(TRANSFORM FASTOPS_CUDA_BINDINGS PREPEND "${PROJECT_SOURCE_DIR}/")

set(FASTOPS_HAS_NVCC OFF)
if(NOT FASTOPS_PYTHON)
  # The kernels are for the module.
elseif(FASTOPS_CUDA MATCHES "^(auto|on|ON|1|true)$")
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES "${FASTOPS_CUDA_ARCHITECTURES}")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    # Asked before the language is enabled, which an nvcc that does not know these GPUs would end with an error.
    find_package(CUDAToolkit 12.8 QUIET)
    set(FASTOPS_HAS_NVCC ${CUDAToolkit_FOUND})
  endif()
  if(FASTOPS_HAS_NVCC)
    enable_language(CUDA)
  endif()
elseif(NOT FASTOPS_CUDA MATCHES "^(off|OFF|0|false)$")
  message(FATAL_ERROR "FASTOPS_CUDA must be auto, on or off, got ${FASTOPS_CUDA}")
endif()

if(FASTOPS_HAS_NVCC)
  message(STATUS "Kernels for NVIDIA GPUs: ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}, ${FASTOPS_CUDA_ARCHITECTURES}")
  add_library(fastops_cuda OBJECT ${FASTOPS_CUDA_KERNELS} "${PROJECT_SOURCE_DIR}/csrc/cuda/runtime.cu")
  target_include_directories(fastops_cuda PRIVATE "${PROJECT_SOURCE_DIR}/csrc" "${PROJECT_SOURCE_DIR}/csrc/include")
  target_compile_definitions(fastops_cuda PRIVATE FASTOPS_LEVEL=cuda FASTOPS_SCALAR)
  # As on the CPU, the source says which products fuse.
  target_compile_options(fastops_cuda PRIVATE --fmad=false "$<$<BOOL:${FASTOPS_WERROR}>:SHELL:-Werror all-warnings>")
  # A quarter of the size: code for four architectures is alike.
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
    target_compile_options(fastops_cuda PRIVATE --compress-mode=size)
  endif()
  set_target_properties(fastops_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON POSITION_INDEPENDENT_CODE ON
                                                CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  pybind11_add_module(_cuda MODULE ${FASTOPS_CUDA_BINDINGS} $<TARGET_OBJECTS:fastops_cuda>)
  fastops_common_options(_cuda)
  target_link_libraries(_cuda PRIVATE libfastops CUDA::cudart_static)
  set_target_properties(_cuda PROPERTIES INSTALL_RPATH "$ORIGIN/lib" LINKER_LANGUAGE CXX)
  install(TARGETS _cuda LIBRARY DESTINATION fastops)
elseif(NOT FASTOPS_PYTHON OR FASTOPS_CUDA MATCHES "^(off|OFF|0|false)$")
elseif(FASTOPS_CUDA STREQUAL "auto")
  message(STATUS "Kernels for NVIDIA GPUs: not built, no nvcc of CUDA 12.8 or later here")
else()
  message(FATAL_ERROR "FASTOPS_CUDA=${FASTOPS_CUDA}, but there is no nvcc of CUDA 12.8 or later: put it on PATH or set CUDACXX")
endif()
