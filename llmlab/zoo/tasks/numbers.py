"""Number words from 0 to 100 in five languages."""

from __future__ import annotations

from llmlab.zoo.tasks.words import listed

LANGUAGES = ("English", "French", "German", "Spanish", "Italian")

_EN = listed(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen"""
)
_EN_TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")

_FR = listed(
    """zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit
dix-neuf"""
)
_FR_TENS = listed("vingt trente quarante cinquante soixante")

_DE = listed(
    """null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn
siebzehn achtzehn neunzehn"""
)
_DE_TENS = listed("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")

_ES = listed(
    """cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete
dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete veintiocho
veintinueve"""
)
_ES_TENS = listed("treinta cuarenta cincuenta sesenta setenta ochenta noventa")

_IT = listed(
    """zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici
diciassette diciotto diciannove"""
)
_IT_TENS = listed("venti trenta quaranta cinquanta sessanta settanta ottanta novanta")


def _english(n: int) -> str:
    if n < 20:
        return _EN[n]
    tens, unit = divmod(n, 10)
    return "one hundred" if n == 100 else _EN_TENS[tens - 2] + (f"-{_EN[unit]}" if unit else "")


def _french(n: int) -> str:
    if n < 20:
        return _FR[n]
    if n == 100:
        return "cent"
    if n >= 80:  # counted in twenties, and only the round one takes the plural s
        return "quatre-vingts" if n == 80 else f"quatre-vingt-{_FR[n - 80]}"
    tens, unit = (6, n - 60) if n >= 60 else divmod(n, 10)
    if unit == 0:
        return _FR_TENS[tens - 2]
    return _FR_TENS[tens - 2] + (f" et {_FR[unit]}" if unit in (1, 11) else f"-{_FR[unit]}")


def _german(n: int) -> str:
    if n < 20:
        return _DE[n]
    tens, unit = divmod(n, 10)
    if n == 100:
        return "hundert"
    ones = "ein" if unit == 1 else _DE[unit]
    return (f"{ones}und" if unit else "") + _DE_TENS[tens - 2]


def _spanish(n: int) -> str:
    if n < 30:
        return _ES[n]
    tens, unit = divmod(n, 10)
    return "cien" if n == 100 else _ES_TENS[tens - 3] + (f" y {_ES[unit]}" if unit else "")


def _italian(n: int) -> str:
    if n < 20:
        return _IT[n]
    tens, unit = divmod(n, 10)
    if n == 100:
        return "cento"
    stem = _IT_TENS[tens - 2]
    if unit == 0:
        return stem
    if unit in (1, 8):  # the tens lose their vowel before uno and otto
        stem = stem[:-1]
    return stem + ("tré" if unit == 3 else _IT[unit])


_SPEAKERS = {"English": _english, "French": _french, "German": _german, "Spanish": _spanish, "Italian": _italian}


def number_word(n: int, language: str = "English") -> str:
    """`n` in words, 0 <= n <= 100."""
    return _SPEAKERS[language](n)
