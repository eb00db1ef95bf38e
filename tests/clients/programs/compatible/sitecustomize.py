"""On the path of a program that imports SchNetPack 2.1.1: a name in torch that it asks for, and torch 2.5 renamed."""

import torch.utils.data.dataloader as dataloader

if not hasattr(dataloader, "T_co"):
    dataloader.T_co = dataloader._T_co
