/* SPDX-License-Identifier: BSD-3-Clause */
/* Approximate products, a matrix product and a moving average from C. */
#include <fastops/fastops.h>
#include <stdio.h>

int main(void) {
  const float a[6] = {1.5f, 3.0f, -2.5f, 0.1f, 7.0f, 1e-3f}, b[6] = {1.5f, 5.0f, 3.25f, 0.3f, -7.0f, 1e3f};
  float product[6], matrix[4];

  /* An approximate multiplier: Mitchell's, with 7 bits of mantissa. */
  fastops_mitchell_params params = {.form = FASTOPS_FORM_LOG, .mantissa_bits = 7};
  fastops_mitchell* m = NULL;
  if (fastops_mitchell_create(&params, &m) != FASTOPS_OK) return 1;

  /* Element by element; strides are in bytes. */
  if (fastops_mitchell_apply(m, FASTOPS_MUL, FASTOPS_F32, a, 4, b, 4, product, 4, 6) != FASTOPS_OK) return 1;
  for (int i = 0; i < 6; ++i) printf("mul %a\n", product[i]);

  /* (2, 3) times (3, 2); strides are in elements. */
  const fastops_matrix shape_a = {2, 3, 3, 1}, shape_b = {3, 2, 2, 1}, shape_out = {2, 2, 2, 1};
  const void *left = a, *right = b;
  void* out = matrix;
  const fastops_poll no_poll = {NULL, NULL};
  if (fastops_mitchell_matmul(m, FASTOPS_F32, 1, &left, shape_a, &right, shape_b, &out, shape_out, no_poll) !=
      FASTOPS_OK)
    return 1;
  for (int i = 0; i < 4; ++i) printf("matmul %a\n", matrix[i]);
  fastops_mitchell_destroy(m);

  /* One number, by the plain multiplier. */
  printf("one %a\n", fastops_mitchell_div_f64(1.0, 3.0));

  /* shadow += (1 - decay) (param - shadow) */
  float shadow[3] = {0, 0, 0}, param[3] = {1, 2, 3};
  void* data[] = {param, shadow};
  const size_t size[] = {3};
  const uint8_t dtype[] = {FASTOPS_F32, FASTOPS_F32};
  const fastops_tensor_list list = {.count = 1, .roles = 2, .size = size, .data = data, .dtype = dtype};
  const double weight = 0.25;
  if (fastops_ema_update(&list, &weight, 0, NULL) != FASTOPS_OK) return 1;
  for (int i = 0; i < 3; ++i) printf("ema %a\n", shadow[i]);
  return 0;
}
