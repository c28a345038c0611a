"""The FID Inception in plain PyTorch: what our own is timed beside, and compared with, block by block.

Written from the published structure, with BatchNorm unfolded and channels first, so that it shares nothing with
`evaluation.inception` but the names of the tensors, which are pytorch-fid's.
"""

import torch
import torch.nn.functional as F
from torch import nn


class BasicConv(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, n_in: int, n_out: int, size: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(n_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def _average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    """Mixed_5b ... 5d."""

    def __init__(self, n_in: int, n_pool: int):
        super().__init__()
        self.branch1x1 = BasicConv(n_in, 64, 1)
        self.branch5x5_1 = BasicConv(n_in, 48, 1)
        self.branch5x5_2 = BasicConv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv(n_in, 64, 1)
        self.branch3x3dbl_2 = BasicConv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv(96, 96, 3, padding=1)
        self.branch_pool = BasicConv(n_in, n_pool, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class B(nn.Module):
    """Mixed_6a."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = BasicConv(288, 384, 3, 2)
        self.branch3x3dbl_1 = BasicConv(288, 64, 1)
        self.branch3x3dbl_2 = BasicConv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv(96, 96, 3, 2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    """Mixed_6b ... 6e."""

    def __init__(self, n: int):
        super().__init__()
        wide, high = {"size": (1, 7), "padding": (0, 3)}, {"size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv(768, 192, 1)
        self.branch7x7_1 = BasicConv(768, n, 1)
        self.branch7x7_2 = BasicConv(n, n, **wide)
        self.branch7x7_3 = BasicConv(n, 192, **high)
        self.branch7x7dbl_1 = BasicConv(768, n, 1)
        self.branch7x7dbl_2 = BasicConv(n, n, **high)
        self.branch7x7dbl_3 = BasicConv(n, n, **wide)
        self.branch7x7dbl_4 = BasicConv(n, n, **high)
        self.branch7x7dbl_5 = BasicConv(n, 192, **wide)
        self.branch_pool = BasicConv(768, 192, 1)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class D(nn.Module):
    """Mixed_7a."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = BasicConv(768, 192, 1)
        self.branch3x3_2 = BasicConv(192, 320, 3, 2)
        self.branch7x7x3_1 = BasicConv(768, 192, 1)
        self.branch7x7x3_2 = BasicConv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv(192, 192, 3, 2)

    def forward(self, x):
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    """Mixed_7b and 7c."""

    def __init__(self, n_in: int, pool):
        super().__init__()
        wide, high = {"size": (1, 3), "padding": (0, 1)}, {"size": (3, 1), "padding": (1, 0)}
        self.pool = pool
        self.branch1x1 = BasicConv(n_in, 320, 1)
        self.branch3x3_1 = BasicConv(n_in, 384, 1)
        self.branch3x3_2a = BasicConv(384, 384, **wide)
        self.branch3x3_2b = BasicConv(384, 384, **high)
        self.branch3x3dbl_1 = BasicConv(n_in, 448, 1)
        self.branch3x3dbl_2 = BasicConv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv(384, 384, **wide)
        self.branch3x3dbl_3b = BasicConv(384, 384, **high)
        self.branch_pool = BasicConv(n_in, 192, 1)

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        tails = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        tails += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *tails, self.branch_pool(self.pool(x))], 1)


class TorchInception(nn.Module):
    """The network after the resize: images [B, 3, 299, 299] float32 in about [-1, 1] -> features [B, 2048].

    Attributes:
      spatial: of the last call, [B, 2023].
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = BasicConv(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = D()
        self.Mixed_7b, self.Mixed_7c = E(1280, _average), E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        self.spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        return self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))

    def probabilities(self, features):
        """The softmax over classes without the bias, [B, 1008]."""
        return (features @ self.fc.weight.T).softmax(-1)
