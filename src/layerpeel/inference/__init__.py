"""Running a model layer by layer: all candidates in one pass, prefix trees, caches, decoding, sampling, refitting."""
