# %% [markdown]
# # A network that knows when it does not know, and needs a twentieth of its weights
#
# A classifier of handwritten digits gives ten probabilities, and they are often too sure: of a digit that lies on its
# side a network trained by gradient descent may say "7" with 99 %. A Bayesian network has a distribution over weights
# instead of one set of them. Its predictions average over what the data leave open.
#
# Here the network is a model like any other: layers declare weights as latents, the data plate says how many images
# there are, and `method="ssvi"` fits a Gaussian over a *small set* of the weights that it keeps improving while it learns;
# all others are zero, in training too.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import rotate

from ppl import Categorical, explain, given, infer, metrics, model, nn, observe, plate
from ppl.models.learning_sets import digits

QUICK = os.environ.get("SMOKE_TEST") == "1"
STEPS = 300 if QUICK else 1000
DENSITIES = (0.2, 0.05) if QUICK else (1.0, 0.2, 0.1, 0.05, 0.02)
warnings.simplefilter("ignore")

# %% [markdown]
# ## The data
#
# 1797 digits of 8 x 8 pixels, that scikit-learn carries; 360 are held back.

# %%
train, test = digits()
print({name: array.shape for name, array in train.items()})

figure, axes = plt.subplots(1, 8, figsize=(8, 1.3))
for axis, image, label in zip(axes, train["x"], train["label"], strict=False):
    axis.imshow(image[0], cmap="gray_r")
    axis.set(title=str(label), xticks=[], yticks=[])
figure.tight_layout()
figure.savefig("digits.png", dpi=120)

# %% [markdown]
# ## The model
#
# A layer is called on one image. Weights live in plates of their own (`fc1.out`, `fc1.in`), so that results can be asked
# for by name. The prior is a Normal with variance one over the number of inputs, unless another is given.


# %%
@model
def network(width=128):
    net = nn.Sequential(nn.Flatten(), nn.MLP(64, width, width, 10))
    with plate("image"):
        observe("label", Categorical(logits=net(given("x"))))


print(explain(network(), train))

# %% [markdown]
# ## Twenty times fewer weights
#
# `density=0.05` keeps 5 % of the weights. Every so often those whose signal is weakest compared with their uncertainty
# are dropped, and those whose gradient says that they would help most come in. N, the number of images, is the size of
# the plate: nobody has to scale a KL term.

# %%
posterior = infer(
    network(),
    train,
    method="ssvi",
    density=0.05,
    minibatch={"image": 128},
    max_iters=STEPS,
    seed=0,
    progress=False,
)
print(posterior)

prediction = posterior.predict({"x": test["x"]}, n=30, seed=0)
label = torch.as_tensor(test["label"])
probs = prediction.probs("label")
accuracy = float(metrics.accuracy(probs, label))
print(f"accuracy {accuracy:.3f}, log loss {float(metrics.nll(probs, label)):.3f}")
print(f"calibration error {float(metrics.ece(probs, label)):.3f}, density {posterior.density:.3f}")

# %% [markdown]
# Which pixels does the first layer read? Border pixels are the same in every image, and hardly a weight is left there.

# %%
weight = posterior.mean("fc1.weight")
read = (weight != 0).sum(0).reshape(8, 8)
figure, axes = plt.subplots(1, 2, figsize=(7, 3))
shown = axes[0].imshow(read, cmap="viridis")
axes[0].set(title="weights on each pixel", xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[0])
axes[1].imshow(train["x"].std(0)[0], cmap="viridis")
axes[1].set(title="how much each pixel varies", xticks=[], yticks=[])
figure.tight_layout()
figure.savefig("pixels.png", dpi=120)

# %% [markdown]
# ## Digits on their side
#
# The same test digits, turned little by little. Nothing of the kind was in the training set, and no method reads them
# well. What differs is whether a network *notices*. Beside ours: the same layers trained to one point by Adam.

# %%
plain = torch.nn.Sequential(
    torch.nn.Flatten(),
    torch.nn.Linear(64, 128), torch.nn.ReLU(),
    torch.nn.Linear(128, 128), torch.nn.ReLU(),
    torch.nn.Linear(128, 10),
)  # fmt: skip
optimiser = torch.optim.Adam(plain.parameters(), 1e-3)
x, y = torch.as_tensor(train["x"]), torch.as_tensor(train["label"])
for _ in range(STEPS):
    rows = torch.randint(len(y), (128,))
    optimiser.zero_grad()
    torch.nn.functional.cross_entropy(plain(x[rows]), y[rows]).backward()
    optimiser.step()

ANGLES = (0, 90) if QUICK else (0, 15, 30, 45, 60, 75, 90)
scores = {name: [] for name in ("one point", "ssvi")}
for angle in ANGLES:
    turned = rotate(test["x"], angle, axes=(2, 3), reshape=False, order=1, mode="nearest")
    with torch.no_grad():
        point = plain(torch.as_tensor(turned)).softmax(-1)
    ours = posterior.predict({"x": turned}, n=30, seed=0).probs("label")
    for name, p in (("one point", point), ("ssvi", ours)):
        loss, sure = float(metrics.nll(p, label)), float(p.max(-1).values.mean())
        scores[name].append((float(metrics.accuracy(p, label)), sure, loss))
for name, rows in scores.items():
    found = "; ".join(
        f"{a}: {r[0]:.2f}, {r[1]:.2f}, {r[2]:.2f}" for a, r in zip(ANGLES, rows, strict=True)
    )
    print(f"{name}, degrees: right, sure of itself, log loss: {found}")

figure, axes = plt.subplots(1, 3, figsize=(10, 2.9))
for name, rows in scores.items():
    for axis, values in zip(axes, zip(*rows, strict=True), strict=True):
        axis.plot(ANGLES, values, "o-", label=name)
for axis, title in zip(
    axes, ("share that is right", "probability of its answer", "log loss in nats"), strict=True
):
    axis.set(title=title, xlabel="turned by degrees")
axes[0].legend()
figure.tight_layout()
figure.savefig("turned.png", dpi=120)

# %% [markdown]
# Both go wrong at the same angles. The point estimate stays sure of itself, and pays for it in log loss; ours loses part of
# its confidence. It does not lose enough: a mean-field posterior under-estimates what it does not know far from
# the data, and fewer weights do not change that.
#
# Which turned digits is it least sure of? The mutual information between label and weights is the part of the entropy that
# more data would take away.

# %%
strange = posterior.predict({"x": turned}, n=30, seed=0)
order = strange.mutual_information("label").argsort(descending=True)[:8]
print("upright", f"{prediction.mutual_information('label').mean():.3f} nats of mutual information, turned",
      f"{strange.mutual_information('label').mean():.3f}")  # fmt: skip
figure, axis = plt.subplots(figsize=(8, 1.4))
strip = [np.pad(turned[i, 0], 1, constant_values=turned.min()) for i in order]
axis.imshow(np.concatenate(strip, axis=1), cmap="gray_r")
axis.set(xticks=[], yticks=[], title="turned digits it would like to see more of")
figure.tight_layout()
figure.savefig("least_sure.png", dpi=120)

# %% [markdown]
# ## How few weights are enough?
#
# The same network at several densities, beside a set that was drawn once and never moved (`rate=0`): where a weight
# stands matters more than how many there are.

# %%
curves = {"moving set": {}, "static set": {"rate": 0.0}}
found = {name: [] for name in curves}
for name, options in curves.items():
    for density in DENSITIES:
        fit = infer(
            network(), train, method="ssvi", density=density, minibatch={"image": 128},
            max_iters=STEPS, seed=1, progress=False, **options,
        )  # fmt: skip
        p = fit.predict({"x": test["x"]}, n=30, seed=0).probs("label")
        found[name].append(float(metrics.accuracy(p, label)))
    pairs = (f"{d:g}: {a:.3f}" for d, a in zip(DENSITIES, found[name], strict=True))
    print(name, ", ".join(pairs))

figure, axis = plt.subplots(figsize=(5, 3.2))
for name, values in found.items():
    axis.plot(DENSITIES, values, "o-", label=name)
axis.set(xscale="log", xlabel="share of weights", ylabel="accuracy")
axis.legend()
figure.tight_layout()
figure.savefig("density.png", dpi=120)

# %% [markdown]
# ## Something to carry away
#
# `compress()` writes the weights that are left and drops units that nothing reads; `to_module()` is a plain torch module.

# %%
small = posterior.compress()
print(small)
module = posterior.to_module("mean").eval()
logits = module(torch.as_tensor(test["x"]))
print("the mean network says", logits.argmax(-1)[:10].tolist(), "for", label[:10].tolist())

# %%
assert accuracy > 0.85
assert scores["ssvi"][-1][2] < scores["one point"][-1][2]
assert found["moving set"][-1] > found["static set"][-1]
