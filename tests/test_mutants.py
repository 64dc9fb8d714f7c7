"""The mutations of tests/mutants.py fit the program, and a fast part of them is caught."""
import re

import pytest

import mutants


@pytest.mark.parametrize("name", mutants.MUTATIONS)
def test_a_mutation_fits_the_program(repo, name):
    source = (repo / "train_gpt.py").read_text(encoding="utf-8")
    changed = mutants.apply(mutants.MUTATIONS[name], source)
    compile(changed, name, "exec")
    assert changed != source


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, mutation in mutants.MUTATIONS.items() if mutation.is_fast])
def test_a_broken_rule_is_noticed(name):
    mutation = mutants.MUTATIONS[name]
    has_survived, closing = mutants.tests_pass(mutation.tests, mutation)
    assert not has_survived, f"the tests pass without the rule: {closing}"


def test_a_mutation_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="(?s)found it 0 times.*adapt the mutation"):
        mutants.apply(mutants.Mutation("not there", "", "tests"), "program")


def test_the_committed_table_is_that_of_these_mutations(repo):
    """Every mutation was run by hand and caught, by the tests that are named now."""
    table = (repo / "tests" / "mutants.txt").read_text(encoding="utf-8")
    caught = dict(re.findall(r"^ +caught +(\w+) +(.+)$", table, re.MULTILINE))
    assert caught == {name: mutation.tests for name, mutation in mutants.MUTATIONS.items()}
    assert table.splitlines()[-1] == f"mutants mutations:{len(caught)} survivors:0 failing_unmutated:0"
