/* SPDX-License-Identifier: BSD-3-Clause */
/* What a library of one's own sees and changes of fastops' state. */
#include <fastops/fastops.h>

const char* plugin_get_target(void) { return fastops_get_target(); }
int plugin_set_target(const char* name) { return fastops_set_target(name); }
unsigned plugin_get_num_threads(void) { return fastops_get_num_threads(); }
int plugin_set_num_threads(unsigned count) { return fastops_set_num_threads(count); }
