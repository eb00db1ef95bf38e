"""Compiles the phases of a stage: makes graphs of FE, FF, BF, BE, WF and WE, which inductor compiles.

Autograd runs only once, while the joint graph of a stage is traced. Every phase is then a plain function of tensors.
"""
