"""The matrix of clients that others wrote."""

from bench.client_matrix import table


def test_the_table_tells_what_works_and_what_was_not_tried() -> None:
    row = {"client": "x", "version": "1", "cells": {"chat": "works", "stream": "Error: no", "extra": "works"}}
    assert table([row]).splitlines()[-1] == "| x 1 | yes | no |  |  |  |  |  | extra |"
