"""Products of 8-bit rows and 8-bit weights, with a scale for each row of both, in FP8 (e4m3) or INT8."""
