import sys; sys.path.insert(0, "/tmp/scratch_ptq")
import pytest
import rows as R
B = R.B
@pytest.mark.parametrize("name", list(B.TRANSFORMS))
def test_a(name, network): B.test_jitted_equals_eager_and_the_input_is_untouched(name, network)
@pytest.mark.parametrize("name", list(B.TRANSFORMS))
def test_b(name, network): B.test_vmapped_equals_one_by_one(name, network)
@pytest.mark.parametrize("name", list(B.TRANSFORMS))
def test_c(name, network, images, tmp_path): B.test_what_was_saved_comes_back_bit_for_bit(name, network, images, tmp_path)
