#!/usr/bin/env bash
# MNIST on a GPU: the larger sister of the network that benchmarks/results/mnist was made with. Stages as in cifar10.sh.
data=${DATA:-mnist} runs=${RUNS:-runs/mnist-gpu} suite=benchmarks/suites/images.toml
channels=64,128,128 feature_channels=32,64,128 steps=30000 flip=
source "$(dirname "$0")/stages.sh"
