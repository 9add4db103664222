"""Small stories for the demo corpus: plots as tables of beats, told with one cast throughout.

A plot is a tuple of beats in order, a beat a tuple of ways to say it. Every way of saying a beat
fits every way of saying its neighbours, so seven beats with three ways each are two thousand
stories before any name changes.
"""

from __future__ import annotations

import re
from random import Random

Beat = tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


GIRLS = words(
    "Ada Anna Bella Clara Daisy Ella Emma Fern Grace Hana Iris Ivy Julia Kira Lily Lucy Maya Mia "
    "Nina Nora Olive Poppy Rosa Ruby Sara Sofia Tess Vera Willow Zoe"
)
BOYS = words(
    "Adam Amir Ben Carl Dan Elias Finn George Hugo Ivan Jack Jonas Karl Leo Liam Luca Max Milo "
    "Noah Omar Oscar Paul Rafi Sam Theo Tim Toby Tom Victor Will"
)
ANIMALS = words(
    "fox rabbit mouse bear owl duck frog hedgehog squirrel cat dog goat lamb pony otter badger "
    "robin turtle"
)
PLACES = (
    "in a village by the sea",
    "in a small town near the hills",
    "in a house at the edge of the forest",
    "on a farm beside a river",
    "in a cottage under an old oak",
    "in a tall house in the city",
    "in a valley full of apple trees",
    "on an island with one lighthouse",
    "in a quiet street behind the market",
    "at a mill at the end of the lane",
)
SPOTS = phrases(
    "the garden|the forest|the river|the old bridge|the barn|the hill|the beach|the market|"
    "the orchard|the meadow"
)
THINGS = phrases(
    "red kite|blue ball|wooden boat|silver key|green hat|little drum|warm scarf|yellow bucket|"
    "paper lantern|tin whistle|toy train|brass bell|white feather|round stone|striped umbrella|"
    "old map|golden button|small mirror"
)
FOODS = phrases(
    "bread|apple pie|vegetable soup|honey cake|plum jam|cheese|rice pudding|berry tart|"
    "carrot stew|ginger bread"
)
WEATHERS = (
    "The sun was warm and the sky was blue.",
    "A soft wind blew from the west.",
    "It had rained in the night, and the grass was wet.",
    "Snow lay on the roofs, and the air was cold and clear.",
    "The morning was grey, but it was not cold.",
    "Birds were singing in every tree.",
    "White clouds moved slowly over the fields.",
    "The leaves were turning red and gold.",
)
OPENINGS: Beat = (
    "Once upon a time, {hero} lived {place}.",
    "Once there was a {kind} named {hero} who lived {place}.",
    "{hero} was a {kind} who lived {place}.",
    "{Place} there lived a {kind} called {hero}.",
    "Long ago, {place}, there was a {kind} whose name was {hero}.",
    "There was once a {kind} named {hero}, who lived {place}.",
)
FRIENDS: Beat = (
    "{His} best friend was {friend}, a {friend_kind}.",
    "{He} had a good friend, a {friend_kind} called {friend}.",
    "{friend} the {friend_kind} lived next door, and the two were always together.",
    "Every day {he} played with {friend}, a {friend_kind} with a kind heart.",
)
ENDINGS: Beat = (
    "That night {hero} slept well.",
    "And from that day on, {hero} and {friend} were closer than ever.",
    "{hero} never forgot that day.",
    "When {he} went to bed that evening, {hero} was smiling.",
    "It had been a good day.",
    "They still tell that story, and they always laugh at the end.",
)
PLOTS: tuple[tuple[Beat, ...], ...] = (
    (
        (
            "{hero} loved {his} {thing} more than anything.",
            "On {his} birthday {hero} got a {thing}, and {he} took it everywhere.",
            "{hero} had a {thing} that had once belonged to {his} grandmother.",
        ),
        (
            "One day the {thing} was gone.",
            "But one morning {he} could not find the {thing}.",
            "Then, on a windy afternoon, the {thing} was lost.",
        ),
        (
            "{hero} looked under the bed and behind the door, but it was not there.",
            "{He} looked in every room and in every box, and found nothing.",
            '"Where can it be?" asked {hero}. {He} felt sad.',
        ),
        (
            '"Do not worry," said {friend}. "We will look for it together."',
            '{friend} said, "Let us think. Where did you see it last?"',
            '"I will help you," said {friend}, and took a lamp.',
        ),
        (
            "They walked to {spot} and looked in the grass.",
            "They went to {spot}, where {hero} had played the day before.",
            "Together they searched {spot} from one end to the other.",
        ),
        (
            "There, under a pile of leaves, was the {thing}.",
            "At last {friend} saw something shine. It was the {thing}!",
            "A {animal} was sitting there, and beside it lay the {thing}.",
        ),
        (
            '"Thank you, {friend}," said {hero}. "You are a true friend."',
            "{hero} was so happy that {he} danced all the way home.",
            "{hero} held the {thing} tight and laughed.",
        ),
    ),
    (
        (
            "One morning {hero} heard a small cry from {spot}.",
            "On the way to {spot}, {hero} found a little {animal} in the grass.",
            "One day {hero} saw a young {animal} near {spot}.",
        ),
        (
            "The {animal} had hurt its leg and could not walk.",
            "The poor {animal} was cold and hungry.",
            "The {animal} was lost, and it was shaking with fear.",
        ),
        (
            "{hero} took off {his} coat and put it around the {animal}.",
            '"Do not be afraid," said {hero} in a soft voice.',
            "{hero} sat down beside it and waited until it was calm.",
        ),
        (
            "Then {he} ran to get {friend}.",
            "{He} called {friend}, who knew all about animals.",
            "{friend} came with warm milk and a clean cloth.",
        ),
        (
            "Together they carried the {animal} home and made a bed for it by the fire.",
            "They gave it some {food} and a bowl of water.",
            "All night they took turns and watched over the {animal}.",
        ),
        (
            "After a week the {animal} was strong again.",
            "Day by day the {animal} grew stronger.",
            "In the spring the {animal} could run and jump.",
        ),
        (
            "It went back to {spot}, but it came to visit every Sunday.",
            "{hero} opened the door, and the {animal} looked back once before it ran away.",
            '"You can stay with us," said {hero}, and the {animal} stayed.',
        ),
    ),
    (
        (
            "Every year there was a feast in the village, and everyone brought food.",
            "The next day was the birthday of {friend}, and {hero} wanted to bake something.",
            "One day {hero} wanted to surprise {friend} with a meal.",
        ),
        (
            '"I will make {food}," said {hero}.',
            "{hero} chose to make {food}, because {friend} liked it best.",
            "{He} found an old book and read how to make {food}.",
        ),
        (
            "{He} washed {his} hands and lit the oven.",
            "First {he} went to the market and bought all that {he} needed.",
            "{He} put on an apron and began to work.",
        ),
        (
            "But {he} was in a hurry, and {he} put in salt in place of sugar.",
            "But the phone rang, and {he} forgot the oven. Soon there was smoke.",
            "But when {he} turned around, a {animal} had eaten half of it.",
        ),
        (
            '"Oh no!" cried {hero}. "Now I have to start again."',
            "{hero} sat on the floor and wanted to cry.",
            "{hero} looked at the kitchen and did not know what to do.",
        ),
        (
            'Just then {friend} came in and laughed. "Let us do it together," {friend} said.',
            "{friend} knocked at the door. Soon they were both at work.",
            "Then {he} took a deep breath and tried again, slowly this time.",
        ),
        (
            "The second time the {food} turned out very well.",
            "In the end it was the best {food} that anyone had ever tasted.",
            "That evening they ate the {food} at a long table, and nothing was left.",
        ),
    ),
    (
        (
            "{hero} wanted to learn to swim, but {he} was afraid of deep water.",
            "{hero} wanted to ride a bicycle, but {he} always fell.",
            "{hero} wanted to play the flute, but it only made strange sounds.",
            "{hero} wanted to climb the tallest tree near {spot}, but it was very high.",
        ),
        (
            '"I will never learn it," {he} said.',
            "The others laughed, and {hero} went home with a red face.",
            "{He} tried once, and twice, and then {he} gave up.",
        ),
        (
            '"Nobody can do it on the first day," said {friend}.',
            '{friend} said, "Try a little every day, and do not hurry."',
            '"I could not do it either," said {friend}. "It took me a whole summer."',
        ),
        (
            "So {hero} tried again the next morning, and the morning after that.",
            "So every day after school, {hero} and {friend} went to {spot} to practise.",
            "So {hero} made a plan and put it on the wall.",
        ),
        (
            "On Monday it was hard. On Friday it was not so hard.",
            "At first nothing changed. Then, little by little, it became easier.",
            "Some days were good and some were bad, but {he} did not stop.",
        ),
        (
            "One day, all at once, {he} could do it.",
            "After three weeks {he} did it without any help.",
            "And then, on a bright afternoon, it worked.",
        ),
        (
            '"Look at me!" shouted {hero}, and {friend} clapped.',
            '"You see," said {friend}, "you only had to keep going."',
            "{hero} was proud, and {friend} was proud too.",
        ),
    ),
    (
        (
            "One night there was a great storm.",
            "One evening the wind began to howl, and rain beat on the windows.",
            "In the middle of the night {hero} woke up, because the thunder was so loud.",
        ),
        (
            "The lights went out, and the house was dark.",
            "A big branch fell in front of the door.",
            "Something knocked on the roof, again and again.",
        ),
        (
            "{hero} was afraid and hid under the blanket.",
            "{hero} took {his} {thing} and held it close.",
            '"What was that?" whispered {hero}.',
        ),
        (
            "Then {he} heard a voice outside. It was {friend}!",
            "Then there was a knock at the door. {friend} stood there, wet from head to foot.",
            "Then {he} saw a light in the window. {friend} had come with a lantern.",
        ),
        (
            "They sat by the fire, ate {food}, and told each other stories.",
            "They counted the seconds between the lightning and the thunder.",
            "They sang every song they knew, louder than the wind.",
        ),
        (
            "Slowly the storm moved away.",
            "In the morning the sky was clear.",
            "When the sun came up, everything was quiet.",
        ),
        (
            "Only a {animal} sat on the roof and looked down at them.",
            '"It was only wind and water," said {hero}, and felt brave.',
            "They went out to {spot} and saw a rainbow.",
        ),
    ),
    (
        (
            "One spring {hero} planted a seed near {spot}.",
            "{friend} gave {hero} a small brown seed.",
            "{hero} found a strange seed in the pocket of an old coat.",
        ),
        (
            "{He} gave it water every morning.",
            "{He} put it in good earth, where the sun could reach it.",
            '"What will it be?" asked {hero}. "Wait and see," said {friend}.',
        ),
        (
            "For a long time nothing happened.",
            "One week passed, and then another.",
            "{hero} looked every day, but there was only earth.",
        ),
        (
            "Then a tiny green leaf came up.",
            "One morning there was a little green point in the earth.",
            "But after the first warm rain, a small plant stood there.",
        ),
        (
            "A {animal} wanted to eat it, so {hero} built a fence.",
            "The wind was strong, so {friend} tied it to a stick.",
            "The summer was dry, so they carried water from the river.",
        ),
        (
            "By the end of summer it was taller than {hero}.",
            "It grew and grew until it reached the window.",
            "In August it had a flower as big as a plate.",
        ),
        (
            "{hero} kept the seeds, and gave one to everyone who asked.",
            "The next year there were ten of them, and bees came from far away.",
            "People stopped to look at it, and {hero} told them how it began.",
        ),
    ),
    (
        (
            "One day {hero} and {friend} found a {thing} near {spot}.",
            "{hero} and {friend} were walking past {spot} when they saw a {thing}.",
            "Near {spot}, half under the sand, lay a {thing}.",
        ),
        (
            '"I saw it first," said {hero}. "No, I did," said {friend}.',
            "Both of them wanted to keep it.",
            '"It is mine," said {friend}. "It is mine," said {hero}.',
        ),
        (
            "They pulled at it from both sides.",
            "They shouted until an old {animal} woke up.",
            "They turned their backs and did not speak for an hour.",
        ),
        (
            "Then they heard someone cry. A child was looking for the {thing}.",
            "Then an old woman came along the path. She was looking for something.",
            "Then they saw a name on it. It belonged to the baker.",
        ),
        (
            "{hero} looked at {friend}, and {friend} looked at {hero}.",
            "{hero} felt ashamed, and {friend} did too.",
            "Now they both knew what to do.",
        ),
        (
            "They gave the {thing} back together.",
            "Without a word they took the {thing} to its owner.",
            '"Here it is," they said with one voice.',
        ),
        (
            "As a thank you, they were given some {food}, and they shared it.",
            '"I am sorry," said {hero}. "So am I," said {friend}.',
            "On the way home they laughed about it.",
        ),
    ),
    (
        (
            "One summer {hero} and {friend} built a boat.",
            "{hero} wanted to build a house in a tree.",
            "{hero} and {friend} made a plan to build a bridge over the stream.",
        ),
        (
            "They found old boards behind the barn.",
            "The miller gave them wood, and the smith gave them nails.",
            "They had a saw, a hammer, and a great many ideas.",
        ),
        (
            "{hero} measured everything twice, and {friend} cut the wood.",
            "{friend} drew a picture of how it should look.",
            "They worked from breakfast until the sun went down.",
        ),
        (
            "On the third day it all fell down.",
            "But the first try was too weak, and it broke in the middle.",
            "But then a {animal} ran off with the last rope.",
        ),
        (
            '"Now we know how not to do it," said {friend}.',
            "{hero} sighed, picked up the hammer, and started again.",
            "They ate some {food} and thought about it.",
        ),
        (
            "The second time they made it stronger.",
            "An old carpenter showed them a better way to join the wood.",
            "They worked more slowly now, and they helped each other.",
        ),
        (
            "When it was done, they hung a {thing} on it for luck.",
            "It was not beautiful, but it was strong, and it was theirs.",
            "The whole village came to see it.",
        ),
    ),
    (
        (
            "One day a letter came for {hero}.",
            "Early one morning the postman brought a letter with a blue stamp.",
            "{hero} found a letter in a bottle near {spot}.",
        ),
        (
            'It said, "Please come to {spot} at noon, and bring a {thing}."',
            'In it was a map, and under the map it said, "Follow the line."',
            'It said only, "I need your help." There was no name.',
        ),
        (
            "{hero} showed it to {friend}, and they set out at once.",
            '"Will you come with me?" {hero} asked {friend}. "Of course," said {friend}.',
            "{He} packed some {food} and called {friend}.",
        ),
        (
            "They walked over two hills and through a dark wood.",
            "The road was long, and their feet were sore.",
            "On the way a {animal} showed them which path to take.",
        ),
        (
            "At last they came to a small door in a wall.",
            "At last they saw smoke from a chimney.",
            "At last they stood before an old tower.",
        ),
        (
            "Inside sat {his} grandfather, and there was cake on the table.",
            "Inside were all their friends, who had planned a feast.",
            "Inside an old sailor was waiting. He could not find his glasses.",
        ),
        (
            '"I knew that you would come," said a voice, and nobody was lonely that day.',
            "They stayed until the stars came out.",
            "They read, ate, and talked until it was late.",
        ),
    ),
    (
        (
            "{hero} had a stall at the market, where {he} sold {food}.",
            "On market day {hero} took a basket of {food} to town.",
            "{hero} had only one coin, and {he} wanted to buy a {thing}.",
        ),
        (
            "All morning nobody came.",
            "The market was full of people, and everyone was in a hurry.",
            "It was a slow day, and {hero} was bored.",
        ),
        (
            "Then an old man with a {thing} stopped in front of {him}.",
            "Then {friend} came by and looked unhappy.",
            "Then a hungry {animal} came and sat at {his} feet.",
        ),
        (
            '"I have no money," said {friend}, who stood there too.',
            '"Are you hungry?" asked {hero}.',
            '{hero} thought for a moment. "Let us share," {he} said.',
        ),
        (
            "So {hero} gave away half of all that {he} had.",
            "So {hero} made three equal parts of the {food}.",
            "So they sat down together and ate.",
        ),
        (
            "People saw it and came closer.",
            "Soon a girl stopped, and then a man, and then a whole family.",
            '"That smells good," said a woman in a long coat.',
        ),
        (
            "By evening everything was sold.",
            "That day {hero} learned that what you give comes back.",
            "When {he} went home, {his} basket was empty and {his} heart was full.",
        ),
    ),
)


def tell(r: Random) -> tuple[str, str]:
    """One story and its opening sentence, of one to three paragraphs."""
    cast = _cast(r)

    def say(beat: Beat) -> str:
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", r.choice(beat).format_map(cast))

    opening = say(OPENINGS)
    first = [opening, say(FRIENDS)]
    if r.random() < 0.5:
        first.append(r.choice(WEATHERS))
    plot = [say(beat) for beat in r.choice(PLOTS)]
    if r.random() < 0.7:
        plot.append(say(ENDINGS))
    cut = r.randint(3, 5)
    glue = r.choice((" ", "\n"))
    return " ".join(first) + glue + " ".join(plot[:cut]) + glue + " ".join(plot[cut:]), opening


def _cast(r: Random) -> dict[str, str]:
    girl = r.random() < 0.5
    hero = r.choice(GIRLS if girl else BOYS)
    friend = r.choice([name for name in GIRLS + BOYS if name != hero])
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    kinds = ("girl", "young girl", "clever girl") if girl else ("boy", "young boy", "clever boy")
    place = r.choice(PLACES)
    folk = r.sample([*ANIMALS, "baker", "gardener", "sailor", "painter", "tailor", "teacher"], 3)
    animals = [kind for kind in r.sample(ANIMALS, 3) if kind not in folk[:2]]
    return {
        "hero": hero,
        "kind": folk[0] if r.random() < 0.4 else r.choice(kinds),
        "he": he,
        "him": him,
        "his": his,
        "He": he.capitalize(),
        "His": his.capitalize(),
        "friend": friend,
        "friend_kind": folk[1],
        "place": place,
        "Place": place.capitalize(),
        "spot": r.choice(SPOTS),
        "thing": r.choice(THINGS),
        "animal": animals[0],
        "food": r.choice(FOODS),
    }
