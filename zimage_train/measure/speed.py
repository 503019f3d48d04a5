"""Whole steps of a run beside those of diffusers with peft, taken in turns in one process.

A step is a batch from main memory, forward, backward, clipping and AdamW. The reference is the usual training script:
diffusers' model with peft's LoRA in bf16 and torch's fused AdamW.
"""
