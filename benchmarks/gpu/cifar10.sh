#!/usr/bin/env bash
# CIFAR-10 on a GPU: a U-Net of 14.7M parameters, its feature network, and the table of benchmarks/suites/images.toml.
#
#     bash benchmarks/gpu/cifar10.sh features     # the feature network
#     bash benchmarks/gpu/cifar10.sh train        # the U-Net: call it again until it says that it is done
#     OUT=out bash benchmarks/gpu/cifar10.sh table
#
# DATA names the images: a zip or a folder of class folders, 32x32 RGB.
data=${DATA:-data/cifar10-jpeg-train.zip} runs=${RUNS:-runs/cifar10} suite=benchmarks/suites/images.toml
channels=64,128,256 feature_channels=64,128,256 steps=60000 flip=--flip
source "$(dirname "$0")/stages.sh"
