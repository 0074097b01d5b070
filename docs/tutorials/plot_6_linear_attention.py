# SPDX-License-Identifier: BSD-3-Clause
"""
Linear attention
================

What the weights of linear attention look like beside those of softmax attention, what a running state is for, and where FAVOR+
stops being an approximation of softmax.
"""

import time

import matplotlib.pyplot as plt
import numpy as np

import fastops

rng = np.random.default_rng(0)

# %%
# The result is a weighted mean of the values. With the identity as values it *is* the matrix of weights: here of 48 tokens whose keys
# resemble those of their neighbours.

n, d = 48, 16
walk = np.cumsum(rng.normal(size=(n + 8, d)), axis=0)
x = walk[8:] - walk[:-8]
x /= x.std()
values = np.eye(n)
weights = {
    "softmax": fastops.softmax_attention(x, x, values, causal=True),
    "linear, elu": fastops.linear_attention(x, x, values, causal=True),
    "linear, exp": fastops.linear_attention(x, x, values, causal=True, feature_map="exp"),
    "efficient attention": fastops.linear_attention(x, x, values, causal=True, feature_map="softmax"),
}
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
for axis, (name, matrix) in zip(axes, weights.items(), strict=True):
    axis.imshow(matrix**0.5, cmap="viridis")
    axis.set(title=name, xticks=[], yticks=[])
plt.show()

# %%
# The weights of softmax are sharper: a state of D x E numbers cannot hold every key by itself. What linear attention has in return is
# time that grows with the length and not with its square.

lengths = [256, 512, 1024, 2048, 4096]
seconds: dict[str, list[float]] = {"softmax": [], "linear": []}
for length in lengths:
    q, k, v = rng.standard_normal((3, 4, length, 32), np.float32)
    for name, function in (("softmax", fastops.softmax_attention), ("linear", fastops.linear_attention)):
        function(q[:, :64], k[:, :64], v[:, :64], causal=True)
        start = time.perf_counter()
        function(q, k, v, causal=True)
        seconds[name].append(time.perf_counter() - start)
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, values_of in seconds.items():
    axis.plot(lengths, values_of, "o-", label=name)
axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds")
axis.legend()
plt.show()

# %%
# A state is all that a later token needs of the earlier ones. After a prompt each token costs the same, however long the text is.

q, k, v = rng.standard_normal((3, 1, 2, 40, 16), np.float32)
whole = fastops.linear_attention(q, k, v, causal=True)
prompt = slice(0, 30)
_, state = fastops.linear_attention(q[:, :, prompt], k[:, :, prompt], v[:, :, prompt], causal=True, return_state=True)
for i in range(30, 40):
    row = fastops.linear_attention_step_(q[:, :, i], k[:, :, i], v[:, :, i], state)
    assert np.allclose(row, whole[:, :, i], atol=1e-5)
print("S", state[0].shape, "z", state[1].shape)

# %%
# Decay lets the state forget: the weights of one row, for some rates per token.

length = 60
ones = np.ones((4, length, 1))
rates = np.array([0.0, -0.02, -0.1, -0.5])
faded = fastops.linear_attention(
    ones, ones, np.broadcast_to(np.eye(length), (4, length, length)), causal=True, decay=rates
)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for rate, matrix in zip(rates, faded, strict=True):
    axis.plot(matrix[-1], label=f"decay {rate:g}")
axis.set(xlabel="key", ylabel="weight in the last row", yscale="log", ylim=(1e-6, 1))
axis.legend()
plt.show()

# %%
# FAVOR+ approximates softmax attention by random features. Its error depends on the size of q and k far more than on the number of
# features: with entries of standard deviation 1 there is nothing left.

deviations = np.array([0.125, 0.25, 0.375, 0.5, 0.625, 0.75])
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
for features in (64, 256):
    projection = fastops.favor_projection(64, features, rng=1)
    errors = []
    for deviation in deviations:
        q, k = deviation * rng.standard_normal((2, 256, 64))
        exact = fastops.softmax_attention(q, k, np.eye(256))
        near = fastops.linear_attention(q, k, np.eye(256), feature_map="favor", projection=projection)
        errors.append(np.linalg.norm(near - exact) / np.linalg.norm(exact))
    axis.plot(deviations, errors, "o-", label=f"{features} features")
axis.set(xlabel="standard deviation of the entries", ylabel="relative error of the weights", yscale="log")
axis.legend()
plt.show()
