"""The web page: images, configs, queue, live runs, sampling and LoRA files, over the run folders alone (torch-free).

It needs the extra `ui` (NiceGUI). Whatever takes time or a GPU runs in processes of its own: a training is the command
`train` on a config file, and goes on when the page ends.
"""
