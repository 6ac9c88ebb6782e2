"""Distillation of image classifiers: ImageNet, CIFAR and folders of images."""
