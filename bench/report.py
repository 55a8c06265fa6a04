"""stub"""


def add_arguments(p):
    pass


def main(given):
    return 0
