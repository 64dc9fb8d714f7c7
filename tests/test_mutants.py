"""The mutations of tests/mutants.py fit the program, and a fast part of them is caught."""
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
    has_survived, closing = mutants.survives(mutants.MUTATIONS[name])
    assert not has_survived, f"the tests pass without the rule: {closing}"


def test_a_mutation_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="(?s)found it 0 times.*adapt the mutation"):
        mutants.apply(mutants.Mutation("rule", "not there", "", "tests"), "program")
