"""The formulas of the package: tensors in, tensors out.

Nothing here knows a config object, a module, a rank or a file, so every formula can be tested alone and in float64.

Letters in the shapes: B rollouts (or rows), T response tokens, L tokens of a whole sequence, V vocabulary.
A mask is a bool tensor or one of 0/1 integers, true where the token is real. What lies outside a mask has no influence
on any result or gradient, whatever it holds: infinities and NaN too.
"""
