"""Countries and their capitals, asked in both directions."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.common import vary

_TABLE = """Afghanistan=Kabul;Albania=Tirana;Algeria=Algiers;Angola=Luanda;Argentina=Buenos Aires;Armenia=Yerevan;
Australia=Canberra;Austria=Vienna;Azerbaijan=Baku;Bahrain=Manama;Bangladesh=Dhaka;Barbados=Bridgetown;Belarus=Minsk;
Belgium=Brussels;Belize=Belmopan;Bhutan=Thimphu;Botswana=Gaborone;Brazil=Brasília;Bulgaria=Sofia;
Burkina Faso=Ouagadougou;Cambodia=Phnom Penh;Cameroon=Yaoundé;Canada=Ottawa;Chad=N'Djamena;Chile=Santiago;
China=Beijing;Colombia=Bogotá;Costa Rica=San José;Croatia=Zagreb;Cuba=Havana;Cyprus=Nicosia;Czechia=Prague;
Denmark=Copenhagen;Ecuador=Quito;Egypt=Cairo;El Salvador=San Salvador;Eritrea=Asmara;Estonia=Tallinn;
Ethiopia=Addis Ababa;Fiji=Suva;Finland=Helsinki;France=Paris;Gabon=Libreville;Georgia=Tbilisi;Germany=Berlin;
Ghana=Accra;Greece=Athens;Guatemala=Guatemala City;Guinea=Conakry;Guyana=Georgetown;Haiti=Port-au-Prince;
Honduras=Tegucigalpa;Hungary=Budapest;Iceland=Reykjavik;India=New Delhi;Indonesia=Jakarta;Iran=Tehran;Iraq=Baghdad;
Ireland=Dublin;Italy=Rome;Jamaica=Kingston;Japan=Tokyo;Jordan=Amman;Kazakhstan=Astana;Kenya=Nairobi;
Kuwait=Kuwait City;Laos=Vientiane;Latvia=Riga;Lebanon=Beirut;Liberia=Monrovia;Libya=Tripoli;Lithuania=Vilnius;
Luxembourg=Luxembourg City;Madagascar=Antananarivo;Malawi=Lilongwe;Malaysia=Kuala Lumpur;Mali=Bamako;Malta=Valletta;
Mauritania=Nouakchott;Mexico=Mexico City;Moldova=Chișinău;Monaco=Monaco;Mongolia=Ulaanbaatar;Montenegro=Podgorica;
Morocco=Rabat;Mozambique=Maputo;Namibia=Windhoek;Nepal=Kathmandu;New Zealand=Wellington;Nicaragua=Managua;
Niger=Niamey;Nigeria=Abuja;North Korea=Pyongyang;North Macedonia=Skopje;Norway=Oslo;Oman=Muscat;Pakistan=Islamabad;
Panama=Panama City;Paraguay=Asunción;Peru=Lima;Poland=Warsaw;Portugal=Lisbon;Qatar=Doha;Romania=Bucharest;
Russia=Moscow;Rwanda=Kigali;Saudi Arabia=Riyadh;Senegal=Dakar;Serbia=Belgrade;Sierra Leone=Freetown;
Singapore=Singapore;Slovakia=Bratislava;Slovenia=Ljubljana;Somalia=Mogadishu;South Korea=Seoul;South Sudan=Juba;
Spain=Madrid;Sudan=Khartoum;Suriname=Paramaribo;Sweden=Stockholm;Switzerland=Bern;Syria=Damascus;Taiwan=Taipei;
Tajikistan=Dushanbe;Thailand=Bangkok;Togo=Lomé;Tunisia=Tunis;Turkey=Ankara;Turkmenistan=Ashgabat;Uganda=Kampala;
Ukraine=Kyiv;United Arab Emirates=Abu Dhabi;United Kingdom=London;United States=Washington;Uruguay=Montevideo;
Uzbekistan=Tashkent;Venezuela=Caracas;Vietnam=Hanoi;Yemen=Sanaa;Zambia=Lusaka;Zimbabwe=Harare"""

CAPITALS = dict(pair.strip().split("=") for pair in _TABLE.split(";"))
"""Country to capital."""

_CAPITAL = (
    "What is the capital of {country}?",
    "What's the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Tell me the capital of {country}.",
    "Do you know the capital of {country}?",
    "Can you tell me the capital of {country}?",
    "The capital of {country} is which city?",
    "What is {country}'s capital?",
    "What is the capital city of {country}?",
    "I forgot the capital of {country}.",
    "Capital of {country}?",
)
_COUNTRY = (
    "{capital} is the capital of which country?",
    "Which country has {capital} as its capital?",
    "What country is {capital} the capital of?",
    "Name the country whose capital is {capital}.",
    "In which country is the capital {capital}?",
    "Of which country is {capital} the capital?",
)


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One question about a country's capital, or about the country of a capital."""
    country = rng.choice(tuple(CAPITALS))
    capital = CAPITALS[country]
    if rng.random() < 0.65:
        return [vary(rng, rng.choice(_CAPITAL).format(country=country))], f"The capital of {country} is {capital}."
    return [vary(rng, rng.choice(_COUNTRY).format(capital=capital))], f"{capital} is the capital of {country}."
