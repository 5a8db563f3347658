"""Float64 NumPy oracles for recorded inputs, written from the definitions of the layers."""

import numpy as np


def conv_patches(images, size, strides=(1, 1), dilation=(1, 1), padding=((0, 0), (0, 0))):
    """Cut from NHWC images, output by output, the patch in (height, width, channel) order.

    Returns `(images * outputs, size[0] * size[1] * channels)`.
    """
    images = np.pad(np.asarray(images, np.float64), ((0, 0), *padding, (0, 0)))
    reach = [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
    patches = []
    for image in images:
        for top in range(0, image.shape[0] - reach[0] + 1, strides[0]):
            for left in range(0, image.shape[1] - reach[1] + 1, strides[1]):
                patch = [
                    image[top + i * dilation[0], left + j * dilation[1], channel]
                    for i in range(size[0])
                    for j in range(size[1])
                    for channel in range(image.shape[2])
                ]
                patches.append(patch)
    return np.array(patches)


def grouped(patches, groups):
    """Split `(count, positions * channels)` patches by groups of channels, `channels` fastest."""
    positions, channels = groups
    split = patches.reshape(patches.shape[0], positions, *channels)
    return np.moveaxis(split, 2, 0).reshape(channels[0], patches.shape[0], -1)
