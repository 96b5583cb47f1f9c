"""What to do with the bytes: options for each part, their costs, and the knapsack that chooses.

It ends in a layout; writing is the business of `converter.write`.
"""
