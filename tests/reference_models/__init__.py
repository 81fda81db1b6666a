"""Small networks with the parameter names and layouts of published implementations.

Each class computes what its counterpart in another library computes, from parameters that have the names, the nesting,
the shapes and the order of rows of the code that it stands for. So a conversion is checked by what a network
computes, and not by a second conversion. What a class stands for is said in its docstring.
"""
