"""Every tolerance of the tests, with its reason. Dictionaries are for ``assert_close`` and ``assert_allclose``."""

from __future__ import annotations

# ---- everywhere ----------------------------------------------------------------------------------------------------

# Monte Carlo mean against its expectation, in standard errors: a correct program exceeds 5 once in 1.7 million draws.
N_STANDARD_ERRORS = 5.0

# ---- golden --------------------------------------------------------------------------------------------------------

# Parity with the reference's float32 networks: the same weights, operations in another order.
REFERENCE_RTOL = 1e-4

# Of the largest value of an array, for the entries that are differences of much larger numbers.
REFERENCE_ATOL_OF_LARGEST = 1e-6

# Latent means are of order one, so this is some hundred float32 roundings.
LATENT_ATOL = 1e-5

# ---- functional, nn, models ----------------------------------------------------------------------------------------

# The same formula in float64, evaluated in another order: some hundred roundings of 2e-16.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}

# The same formula in float32: some hundred roundings of 6e-8 on numbers of order one.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

# lgamma(x + theta) - lgamma(theta) in float64, x and theta up to 1e6: a difference of numbers of 3e7, known to 4e-9.
LGAMMA_DIFFERENCE = {"rtol": 1e-9, "atol": 1e-7}

# A limit taken at a parameter of 1e7: what is left out is of order x^2 / 1e7, here for x up to 10.
LIMIT_1E7 = {"rtol": 0.0, "atol": 2e-5}

# eps = 1e-8 inside the logarithms and a mean or probability of at least 0.05: relative 2e-7 per count, up to 20 counts.
LOG_EPS = {"rtol": 0.0, "atol": 1e-5}

# Tail beyond the last term of an infinite sum, chosen below 1e-9.
TRUNCATED_SUM = {"rtol": 0.0, "atol": 1e-8}

# Trapezoid rule on an analytic integrand that has vanished at both ends: exponentially small error, so only roundings.
QUADRATURE = {"rtol": 1e-8, "atol": 1e-10}

# ---- kernels -------------------------------------------------------------------------------------------------------

# A float32 kernel against the formula in float64, of the largest entry of a tensor: some tens of roundings of 6e-8 in
# sums over up to 2,000 genes.
COUNT_KERNEL_OF_LARGEST = 2e-6

# The same entry by entry, of 1 + the size of the terms that an entry is made of: some tens of roundings of 6e-8.
COUNT_KERNEL = 2e-6

# A product of matrices in float32 against float64, of the largest entry, in whatever order it is summed up: some
# hundred roundings of 6e-8 in sums over up to 3,000 terms.
PRODUCT_OF_LARGEST = 1e-5

# Loss and gradients of a float32 module with kernels against the same module in float64: some tens of roundings of
# 6e-8 through three layers, of the largest gradient of all parameters.
MODULE_WITH_KERNEL = {"rtol": 2e-5, "atol": 1e-5}

# Held-out ELBO after three epochs: the first roundings differ, and 12 steps of Adam carry them on.
FIT_WITH_KERNEL = {"rtol": 1e-3}

# ---- engine --------------------------------------------------------------------------------------------------------

# Weights and history after some 30 steps of Adam in which gradients were summed up in another order.
FIT_OF_SEVERAL_PROCESSES = {"rtol": 1e-3, "atol": 1e-4}
