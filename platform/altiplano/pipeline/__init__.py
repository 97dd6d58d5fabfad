"""One pipeline file run to its end: stages as steps with manifests, resumable, in a process of its own.

May import everything below the command line. Must never know: terminals, colours, keyboards.
"""
