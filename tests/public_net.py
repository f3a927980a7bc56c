"""What the public net ra92_cifar computes, said in the names of its own state dict; for tests alone."""

import torch
import torch.nn.functional as F


def logits(state, x):
    """The logits [B, 10] of x [B, 3, 32, 32]; `state` is a state dict of tensors."""

    def conv(at, x, stride=1):
        weight = state[f"{at}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm_relu(at, x):
        mean, var, weight, bias = (state[f"{at}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    def unit(at, x, stride=1):
        pre = norm_relu(f"{at}.bn1", x)
        y = conv(f"{at}.conv2", norm_relu(f"{at}.bn2", conv(f"{at}.conv1", pre)), stride)
        y = conv(f"{at}.conv3", norm_relu(f"{at}.bn3", y))
        return y + (x if x.shape == y.shape else conv(f"{at}.conv4", pre, stride))

    def half(x):
        return F.max_pool2d(x, 3, 2, 1)

    def resize(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)

    def attention(at, x, depth):
        x = unit(f"{at}.first_residual_blocks", x)
        trunk = unit(f"{at}.trunk_branches.1", unit(f"{at}.trunk_branches.0", x))
        y = half(x) if depth else x
        if depth == 2:
            down = unit(f"{at}.down_residual_blocks1", y)
            y = half(down)
        y = unit(f"{at}.middle_2r_blocks.1", unit(f"{at}.middle_2r_blocks.0", y))
        if depth == 2:
            y = resize(y, down) + down + unit(f"{at}.skip1_connection_residual_block", down)
            y = unit(f"{at}.up_residual_blocks1", y)
        if depth:
            y = resize(y, trunk) + trunk
        y = conv(f"{at}.conv1_1_blocks.2", norm_relu(f"{at}.conv1_1_blocks.0", y))
        y = conv(f"{at}.conv1_1_blocks.5", norm_relu(f"{at}.conv1_1_blocks.3", y))
        return unit(f"{at}.last_blocks", trunk + torch.sigmoid(y) * trunk)

    x = norm_relu("conv1.1", conv("conv1.0", x))
    x = attention("attention_module1", unit("residual_block1", x), depth=2)
    x = attention("attention_module2", unit("residual_block2", x, stride=2), depth=1)
    x = attention("attention_module2_2", x, depth=1)
    x = attention("attention_module3", unit("residual_block3", x, stride=2), depth=0)
    x = attention("attention_module3_3", attention("attention_module3_2", x, depth=0), depth=0)
    x = unit("residual_block6", unit("residual_block5", unit("residual_block4", x)))
    return F.linear(norm_relu("mpool2.0", x).mean((2, 3)), state["fc.weight"], state["fc.bias"])
