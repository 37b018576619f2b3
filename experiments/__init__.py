"""Studies that test a claim or fit a curve, and their figures. Not part of the wheel."""
