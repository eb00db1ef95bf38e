"""Compiled phases: FE, FF, BF, BE, WF and WE of a stage as graphs that inductor compiles.

Autograd runs only once, while the joint graph of a stage is traced. Every phase is then a plain function of tensors.
"""
