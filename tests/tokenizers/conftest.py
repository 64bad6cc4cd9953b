from tests.data.conftest import corpus as corpus
from tests.data.conftest import tokenizer as tokenizer
from tests.data.conftest import trained as trained
