import numpy as np
import pytest

from critkl_jax.tasks.tokenizers import CharTokenizer


def test_encode_then_decode_is_the_text():
  tokenizer = CharTokenizer()
  text = 'Input:\n12+9\nTarget:\n<scratch>\n[1,2] + [9] , A=[] , C=0 , 2+9+0=11 , A->1 , C->1 END\n</scratch>%'
  tokens = tokenizer.encode(text)
  assert tokens.dtype == np.int32
  assert tokenizer.decode(tokens) == text


def test_padding_is_the_percent_sign():
  tokenizer = CharTokenizer()
  assert tokenizer.decode([tokenizer.pad_id]) == '%'


def test_mask_and_foreign_ids():
  tokenizer = CharTokenizer('%ab')
  assert tokenizer.decode([1, 2, 1], [True, False, True]) == 'aa'
  assert tokenizer.decode([1, 3, -1]) == 'a\ufffd\ufffd'


def test_digits_are_consecutive():
  assert np.all(np.diff(CharTokenizer().encode('0123456789')) == 1)


def test_errors_name_what_is_wrong():
  with pytest.raises(ValueError, match=r"\['x'\]"):
    CharTokenizer().encode('1+x')
  with pytest.raises(ValueError, match='distinct'):
    CharTokenizer('aa')


def test_a_padded_vocabulary_has_ids_without_characters():
  tokenizer = CharTokenizer('%ab', vocab_size=5)
  assert (tokenizer.vocab_size, CharTokenizer('%ab').vocab_size) == (5, 3)
  assert CharTokenizer('%ab', vocab_size=3) == CharTokenizer('%ab')
  assert tokenizer.decode([1, 2, 3, 4, 5]) == 'ab\ufffd\ufffd\ufffd'
  with pytest.raises(ValueError, match='vocab_size: expected 3 or more, one for each character, or 0; got 2'):
    CharTokenizer('%ab', vocab_size=2)
