"""Plain lists of words that several tasks draw from."""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NAMES = listed(
    """Ada Alan Alice Amir Anna Anton Bea Ben Boris Carla Carlos Chen Clara Dana David Diego Dora Elena Elias Emil Emma
    Erik Eva Fatima Felix Finn Fiona Frida Gina Grace Hana Hugo Ida Igor Ines Ivan Jack Jana Jin Joana John Jonas Julia
    Karim Kate Kenji Laila Lara Leo Lena Liam Lina Lisa Luca Lucy Luis Maria Marco Marta Max Maya Mia Mila Milo Mina
    Mona Nadia Nina Nora Noah Olga Oscar Otto Pablo Paul Petra Pia Priya Rahul Rita Robin Rosa Sam Sara Sven Tara Theo
    Tim Tina Tom Uma Vera Victor Wanda Wei Yara Yuki Zara Zoe"""
)

COLORS = listed("red blue green yellow orange purple brown black white gray pink silver golden")

OBJECTS = listed(
    """door box gate room safe bag locker desk drawer car bike boat house shed garage cabinet phone laptop tablet radio
    printer router camera vault trunk chest case tower station office library shop kitchen garden cellar lab studio
    hotel museum theater"""
)

THINGS = listed(
    """apples pears plums lemons books pens coins stones cards eggs shells stamps marbles cups plates keys candles
    flowers balloons cookies cherries buttons tickets toys photos letters"""
)

ANIMALS = listed(
    """cat dog horse cow pig sheep goat duck goose hen fox wolf bear lion tiger zebra camel mouse rat rabbit squirrel
    deer moose otter seal whale dolphin shark salmon trout frog toad snake lizard turtle eagle hawk owl raven crow
    sparrow robin parrot pigeon swan stork penguin bee ant wasp spider beetle butterfly monkey gorilla elephant
    giraffe kangaroo koala panda hedgehog badger beaver crab lobster snail worm"""
)

FOODS = listed(
    """bread butter cheese milk honey sugar salt pepper rice pasta soup salad pizza apple banana cherry grape lemon
    mango melon orange peach pear plum berry carrot onion potato tomato garlic bean pea corn spinach lettuce cabbage
    pumpkin mushroom olive almond walnut peanut chocolate cookie cake pie yogurt cream egg ham bacon sausage tea
    coffee juice water"""
)

PLACES = listed(
    """Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Oslo Stockholm Helsinki Athens Cairo Tokyo
    Lima Delhi Boston Chicago Toronto Sydney Geneva Milan Naples Porto Seville Hamburg Munich Cologne Lyon Nice
    Kyoto Mumbai Dakar Nairobi"""
)

JOBS = listed(
    """baker teacher doctor nurse pilot farmer painter writer singer actor dentist lawyer judge plumber carpenter
    gardener cook waiter driver sailor soldier tailor barber butcher engineer chemist librarian photographer
    musician mechanic"""
)

HOBBIES = listed(
    """chess tennis football swimming dancing painting reading cooking hiking cycling singing running fishing sailing
    skiing drawing knitting gardening"""
)

_OTHERS = listed(
    """air arm art baby back ball band bank base bath beach bed bell belt bench bird blood board body bone book boot
    bottle bowl branch brick bridge brother brush bucket building bus cable candle card carpet castle chain chair
    chalk child church circle city clock cloth cloud club coast coat coin color computer corner country couch court
    cousin cup curtain daughter day dish dream dress drum dust ear earth edge energy engine evening eye face family
    farm father feather fence field finger fire flag flame floor flower foot forest fork friend frame game garden
    ghost glass glove gold grass ground group guitar hair hammer hand harbor hat head heart hill hole holiday home
    honor hospital hour ice idea iron island jacket jar jewel journey judge jungle key king kitchen kite knee knife
    knot ladder lake lamp language leaf leather leg letter level light line lip list lock machine map market mask
    match meal medal metal middle minute mirror money month moon morning mother motor mountain mouth movie music nail
    name neck needle nest night noise north nose note number ocean office oil page pain paint palace paper parcel
    park party path pen pencil people person piano picture pillow pipe planet plant plate pocket poem point pond
    pool prince princess prize problem puzzle queen question rain rainbow rhythm ring river road rock roof root rope
    rose sand scarf school science screen sea season seat secret seed shadow ship shirt shoe shoulder silk silver
    sister skin sky sleep smoke snow soap sock song sound south space spoon spring square stage stair star station
    statue steam stick stone storm story street string student suit summer sun table tail teeth tent thread throat
    thumb thunder ticket time tongue tool tooth town toy track train tree triangle truck trumpet uncle valley vase
    village violin voice wall wallet watch wave weather week wheel whistle wind window wing winter wire wood wool
    word work world wrist year yesterday zipper about after again always because before between beyond could early
    eight enough every first follow found great group happy learn listen little never often other place please pretty
    quiet quick right seven should small spell start strange surprise thank their there these think thought three
    through today together tomorrow under until very where which while would write young yellow beautiful important
    different knowledge necessary neighbor breakfast alphabet adventure calendar celebrate chimney compass crystal
    diamond dinosaur dragon electric elevator explorer factory fantastic festival gravity helicopter hurricane
    imagine keyboard lantern library lightning magazine magic medicine microscope midnight mystery notebook
    orchestra pajamas parachute passenger pyramid railway robot rocket sandwich satellite scissors shampoo
    skeleton submarine sunflower telescope television treasure umbrella vacation vegetable volcano waterfall
    wizard xylophone"""
)

WORDS = tuple(dict.fromkeys((*_OTHERS, *ANIMALS, *FOODS, *JOBS, *HOBBIES, *COLORS, *OBJECTS)))
"""Every lower-case word above, once."""
