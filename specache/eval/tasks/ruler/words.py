"""English words for keys and lists."""

from __future__ import annotations

from functools import cache
from random import Random


def _listed(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _listed("""
able absent agile alert amber ample ancient angry antique arctic ashen autumn awake azure balmy bare basic better big bitter
bizarre black blank bleak blind blond blue blunt bold boring bouncy brave brief bright brisk broad broken bronze brown bulky bumpy
burly busy calm candid careful careless casual cautious charming cheap cheerful chilly choppy chubby civil classic clean clear
clever cloudy clumsy coarse cold colossal common complex cool coral costly cozy crafty cranky creamy creepy crimson crisp crooked
crowded cruel crumbly curious curly curved damp dapper daring dark dashing dear decent deep defiant delicate dense diligent dim
dizzy double drab dreamy drowsy dry dull dusty dutiful eager early earnest eastern easy elastic elegant eminent empty endless
equal eternal exact exotic expert faint fair faithful false famous fancy far fast faulty favorite fearless feisty fertile festive
fierce fiery final fine firm fit fixed flaky flat fluffy foamy fond formal fragile frail frank free fresh friendly frosty frozen
frugal full funny furry fuzzy gaudy general gentle genuine giant giddy gifted glad gleaming global glossy gloomy golden good
graceful grand grateful gray greasy great greedy green grim gritty grouchy grumpy guilty half handsome handy happy hard harsh
hasty healthy heavy helpful hidden high hollow homely honest hopeful horrid hot huge humble humid hungry icy ideal idle immense
innocent inner intense ivory jagged jealous jolly jovial joyful juicy jumpy keen kind known lanky large last late lavish lazy lean
left legal light likely limp linear lively local lofty lonely long loose loud lovely loyal lucky lunar mad magnetic main major
marble massive mature meager mealy mellow merry messy mighty mild milky minor misty mobile modern modest moist mossy muddy muted
mysterious narrow nasty native neat nervous nimble noble noisy normal northern novel numb oaken obedient odd oily old opaque open
orange orderly ornate outer oval overdue pale patient peaceful perfect petite plain pleasant plump polite poor popular posh potent
precious pretty prickly primal private prompt proper proud public puny pure purple puzzled quaint quick quiet radiant ragged rapid
rare raspy raw ready real recent red regal reliable remote rich rigid ripe robust rosy rough round rowdy royal rude rural rusty
sad safe salty sandy scarce scarlet scenic secret secure serene serious severe shabby shady shaky shallow sharp shiny short shrill
shy silent silky silly silver simple sincere single sleek sleepy slim slimy slow sly small smart smooth snowy snug sober social
soft solar solid somber sour southern spare sparse special spicy spiky spotless spotty square stable stale stark steady steep
sticky stiff still stormy stout strange strict strong sturdy subtle sudden sunny superb sweet swift tall tame tan tart tasty tender
tense tepid thick thin thirsty thorny thrifty tidy timid tiny tired total tough tranquil tricky trim true trusty twin ugly ultimate
unique unusual upbeat upper urban useful usual vacant vague vain valid vast velvet vibrant violet vital vivid wary warm wasteful
watery weak wealthy weary wee western wet whimsical white whole wicked wide wild windy wise witty wooden woolly wordy worldly worn
worried worthy yellow young zany zealous
""")

NOUNS = _listed("""
acorn actor airport album alley almond anchor ankle antler apple apron arch arena armor arrow artist attic author avenue badge
bagel bakery balcony ballad balloon bamboo banana banjo banner barber barley barn barrel basin basket beach beacon bean bear beard
beaver bed bee beetle bell belt bench berry bicycle bird biscuit blanket blizzard blossom boat bolt bonnet book boot border bottle
boulder bowl bracelet branch bread breeze brick bridge broom brother bubble bucket buffalo builder bundle bush butter button cabin
cabinet cable cactus cake camel camera camp canal candle cannon canoe canvas canyon captain caravan cargo carpet carriage carrot
cart castle cat cave cedar cellar cello chain chair chalk channel chapel chapter charcoal cheese cherry chess chest chicken chimney
circle circus city clam clarinet cliff clock closet cloth cloud clover coach coast cobbler coconut coffee coin collar comet compass
concert cookie copper cork corner cottage cotton couch country courtyard cousin coyote crab cradle crane crater crayon creek
cricket crow crown crystal cube cucumber cup curtain cushion daisy dancer dawn deck deer dentist desert desk dessert diamond diary
dinner dish doctor dog dollar dolphin donkey door dragon drawer dream dress drum duck dune eagle earring earth easel echo eclipse
editor egg elbow elephant elevator elm engine engineer envelope evening fabric falcon farm farmer feather fence fern ferry festival
fiddle field fig finger fire fish flag flame flask flood floor flower flute fog forest fork fossil fountain fox frame friend frog
fruit furnace galaxy gallery garage garden garlic garment gate gazelle ginger giraffe glacier glass globe glove goat goose grain
grape grass gravel guitar gull hail hammer hamster handle harbor harp harvest hat hawk hazel heart hedge helmet herb hermit heron
hill hinge hobby honey hook horizon horn horse hospital hotel house hunter hut ice igloo inn insect iris iron island ivy jacket
jaguar jam jar jasmine jelly jewel journal journey judge juice jungle kayak kennel kettle key king kitchen kite kitten knee knife
knight knot ladder lady lagoon lake lamb lamp lantern lark lawn lawyer leaf leather lemon lens leopard letter library lighthouse
lily lime linen lion lizard lobster locket lodge lumber machine magnet magpie mailbox mango mantle map maple market marsh mask mast
meadow medal melody melon mermaid meteor mill miller mineral mint mirror mitten monkey monsoon moon moose morning mosaic mosquito
moth motor mountain mouse mouth muffin mule museum mushroom mustard napkin necklace needle nephew nest net newspaper nickel night
noodle notebook nurse nut oak oasis oat ocean octopus office olive onion orchard orchid organ ostrich otter oven owl oyster paddle
painter palace palm pancake panda paper parade parcel park parrot parsley pasture path peach peacock peanut pear pearl pebble
pelican pen pencil penguin pepper piano picture pie pigeon pillow pilot pine pipe pirate planet plate plaza plum pocket poem poet
pond pony poppy porch portrait potato potter powder prairie present prince prison puddle pumpkin puppet pyramid quail quarry quartz
queen quilt rabbit raccoon radio radish raft railway rain raisin ranch raven recipe reef ribbon rice ring river road robin rocket
roof root rope rose ruby rug saddle sail sailor salad salmon salt sand sandal satchel saucer scarf school science scissors seal
season seed shadow shark shawl sheep shelf shell shepherd ship shirt shoe shop shore shovel shrimp sister skate sketch ski skirt
sky sled slipper smoke snail snow sofa soldier song soup spade sparrow spice spider spinach sponge spoon squash squirrel stable
stadium staircase stamp star station statue steam stone stool storm story stove stream street string sugar suit summer sunset swamp
swan sweater sword table tailor tank tapestry taxi tea teacher teapot temple tent theater thimble thistle throne thunder ticket
tiger timber toad toast tomato torch tortoise towel tower town toy tractor trail train tray treasure tree triangle trout truck
trumpet tulip tunnel turkey turnip turtle uncle valley vase vault velvet village vine vineyard violin visitor volcano voyage wagon
waiter wall walnut walrus warden water waterfall wave weather wedding whale wheat wheel whistle willow window winter wizard wolf
wood wool workshop wreath yacht yard yarn zebra zipper
""")

VERBS = _listed("""
accept achieve admire admit advise agree allow amuse announce answer appear applaud argue arrange arrive ask assist attend avoid
bake balance bargain bathe become begin behave believe belong blink boil borrow bounce bow breathe bring browse build burn bury
buy calculate call carry carve catch celebrate change chase chat check cheer chew choose clap climb collect comb combine compare
complain confess confuse consider cook copy count cover crash crawl create cross cry cultivate dance dare decide decorate deliver
depend describe deserve destroy develop dig disagree discover divide drift drink drive drop earn eat educate embrace employ enjoy
enter escape examine excite excuse exercise exist expand explain explore fasten fetch fill find finish fix float flow fly fold
follow forget forgive gather give glow glue grab greet grin grow guard guess guide happen hatch heal hear help hesitate hide hope
hover hug hum hurry identify imagine improve include inform inspect instruct invent invite join joke juggle jump kneel knit knock
laugh launch learn leave lend lick lift listen live lock look love manage marry measure meet melt mend mention mix moan mourn move
multiply murmur nod notice obey observe obtain occur offer order owe pack paint pardon pause pedal perform persuade pinch play
plead point polish possess pour practice praise pray preach prefer prepare pretend prevent produce promise protect prove provide
pull punish push race reach read realize receive recognize reduce refuse regret rejoice relax rely remain remember remind remove
repair repeat replace reply report rescue retire return reveal rinse roam roar run rush save scatter scold scratch scream scrub
search seek select sell send settle sew shake share shiver shout shrug sing sip sit skip sleep slide smash smell smile snatch
sneeze sniff snore soak solve sow speak spell spend spill spin spread sprinkle squeeze squint stand stare start stay steer stir
stitch stop stretch stroll study stumble succeed suggest supply support surprise survive suspect swallow sway swim swing take talk
teach tease tell thank think throw tickle tie tiptoe touch trade translate travel treat tremble trust try tumble type understand
unite unlock unpack urge use vanish visit wait wake walk wander warn wash watch weave weigh welcome whisper win wink wipe wish
wonder work worry wrap wrestle write yawn yell yield zoom
""")


def word_pair(rng: Random) -> str:
    """Return an adjective and a noun, for example `quiet-harbor`."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def distinct_words(rng: Random, count: int) -> list[str]:
    """Return different words, or word pairs if the vocabulary has too few words."""
    if count <= len(_vocabulary()):
        return rng.sample(_vocabulary(), count)
    pairs: dict[str, None] = {}
    while len(pairs) < count:
        pairs[word_pair(rng)] = None
    return list(pairs)


@cache
def _vocabulary() -> list[str]:
    return sorted({*ADJECTIVES, *NOUNS, *VERBS})
