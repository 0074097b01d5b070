// SPDX-License-Identifier: BSD-3-Clause
// To be written.
#include "mitchell/mitchell_params.h"
