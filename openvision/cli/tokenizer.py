"""`openvision tokenizer`: learn a vocabulary, show token ids."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.terminal import counted, echo

app = typer.Typer(help="Learn a WordPiece vocabulary; show token ids.", no_args_is_help=True)


@app.command()
def train(
    source: Annotated[Path, typer.Argument(help="Folder of shards, or a text file with one text a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write tokenizer.json into.")],
    vocab_size: Annotated[int, typer.Option(help="Largest size of the vocabulary.", min=100)] = 32000,
) -> None:
    """Learn a vocabulary from the texts of training shards or of a text file."""
    from openvision.data.shards.dataset import ShardDataset, all_texts
    from openvision.data.shards.selection import names_tars
    from openvision.errors import OpenVisionError
    from openvision.files import make_folder
    from openvision.text.tokenizer import Tokenizer
    from openvision.untrusted import decode_text

    if source.is_dir() or names_tars(source):
        texts = list(all_texts(ShardDataset(source)))
    elif source.is_file():
        texts = decode_text(source.read_bytes())[0].splitlines()
    else:
        raise OpenVisionError(f"{source} is neither a folder of shards nor a text file; check the path")
    tokenizer = Tokenizer.train(texts, vocab_size)
    tokenizer.save(make_folder(output))
    echo(f"{tokenizer.vocab_size} entries from {counted(len(texts), 'text')}: {output / 'tokenizer.json'}")


@app.command()
def encode(
    text: Annotated[str, typer.Argument(help="Text to encode.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, a folder that holds one, or a vocab.txt.")],
    length: Annotated[int, typer.Option(help="Number of ids, including the class token.", min=4)] = 80,
) -> None:
    """Show the token ids of a text as the text tower reads them."""
    from openvision.text.tokenizer import Tokenizer

    loaded = Tokenizer.from_vocabulary(tokenizer) if tokenizer.suffix == ".txt" else Tokenizer.load(tokenizer)
    echo(" ".join(str(index) for index in loaded.encode([text], length)[0]))
