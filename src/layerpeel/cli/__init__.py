"""The command line: one thin function a verb, over the other rooms."""
