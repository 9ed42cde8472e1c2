"""In place of torch in subprocesses that only run fake stages: importing the real one takes seconds, and nothing here computes."""


class cuda:
    @staticmethod
    def is_available():
        return False


class version:
    cuda = None


def manual_seed(seed):
    return seed


def use_deterministic_algorithms(mode, *, warn_only=False):
    return mode, warn_only


def set_num_threads(count):
    return count
