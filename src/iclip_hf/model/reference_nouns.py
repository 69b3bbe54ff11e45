"""What photographs show: the nouns that the presence of a text is estimated against."""

# Every fourth noun of the embedded model's vocabulary (`nouns.txt` of its configuration), in the order of the alphabet. They do as well
# as all, and better than the most frequent ones, because they are more diverse.
REFERENCE_NOUNS = tuple(
    " ".join(noun.split())
    for noun in """
    abacus, acorn, adult, african chameleon, african hunting dog, aircraft carrier, airplane, albatross, altar, american chameleon,
    american lobster, analog clock, ankle, apiary, apron, arctic fox, armchair, artichoke, asphalt, atv, axe, baby bed, backpack,
    bacon, bag, bakery, bald eagle, ballplayer, band aid, banded gecko, bannister, barber chair, barn spider, barricade, baseball
    bat, baseball glove, baseball uniform, basketball, basset, bath, bathroom, batsman, bay, beacon, beaker, beard, bedlington
    terrier, bee eater, beer glass, belongings, beverage, bicycler, bike racer, billboard, biplane, bison, black stork,
    black-footed ferret, blender, blouse, board, bobsled, bone, book jacket, bookshop, border terrier, bottlecap, bow, box turtle,
    brabancon griffon, branch, breakfast, brick building, bridge, broom, bubble, buffet, bulbul, bulletproof vest, bunny, bus stop,
    butter, cab, cable, cake, camel, campfire, can opener, cannon, canyon, car, card, carnival, carriage, carton, cassette, cat,
    cattle, ceiling, cellular telephone, chain mail, chair, cheek, cheetah, chest, chihuahua, chimpanzee, chiton, chopsticks,
    church, circle, city park, clay court, climber, clog, clothes, clover, coach, cock, coffee, coffee shop, coil, colobus,
    comforter, community, computer desk, concert, condiment, consomme, container ship, cookie, corkscrew, costume, counter, course,
    cow, crab, crash helmet, cream cone, crock pot, crosswalk, crown, cup, curtain, customer, dachshund, dam, dandelion, deck,
    depot, dessert, diamondback, diner, dinner, dirt bike, dirt track, dishwasher, display, doberman, dog show, dogsled, dome,
    door, dough, drain, dress shirt, drink, drum, duck, dump truck, dust, earphones, eel, egyptian cat, electric ray, elevator,
    engine, entertainment center, equestrian, espresso maker, explosion, face powder, fan, farmland, feather boa, fencers, fig,
    file, fire engine, fireboat, fireworks, fishing pole, flagpole, flashlight, flip, floor, fly, foil, food truck, football game,
    footballer, forest path, fountain pen, frame, french bulldog, fridge, frisbee, fruit stand, furniture, gar, garden spider,
    gasmask, geese, gesture, gibbon, glacier, glazed donut, go-kart, goblet, golf ball, gondola, gorilla, granny smith,
    grasshopper, great grey owl, green lizard, greens, greyhound dog, groenendael, ground beetle, guillotine, gun, gymnast, hair
    dryer, haircut, hallway, hammerhead, hand blower, handle, hangar, hardwood floor, harp, hat, hay, headdress, headscarf,
    helicopter, hermit crab, hike, hind legs, hockey puck, hole, honeycomb, hoop, horn, horse cart, hot dog, hotel room, house
    finch, hug, hut, ibizan hound, ice lolly, impala, indigo bunting, insect, ipod, irish wolfhound, italian greyhound, jackfruit,
    jay, jeep, jet plane, jinrikisha, juice, junco, kayaker, kettle, kilt, king snake, kitchen counter, kitty, knit cap, komondor,
    labrador, ladle, lakeland terrier, lamppost, lane, laptop computer, lawn mower, leafhopper, ledge, lens cap, lesser panda,
    library, light, lighthouse, liner, lip, living room, lobby, loggerhead, lotion, luggage cart, lynx, madagascar cat, mailbag,
    malamute, maltese dog, mantis, marimba, market stall, marsh, mat, maypole, measuring cup, medicine chest, menu, mexican
    hairless, military uniform, miniature poodle, minivan, mist, mobile home, mohawk, money, monkey bar, mortarboard, motocross
    bike, motorboat, motorcyclist, mountain biker, mountain tent, mousetrap, mud, mural, musician, nail, neck brace, neighborhood,
    newfoundland, nighttime, norwegian elkhound, oar, obstacle course, ocean wave, oil filter, open field, organ, otterhound,
    overhang, owner, oystercatcher, pad, pail, pajamas, pan, paper plate, parade, park, parking garage, partridge, passenger bus,
    pasta, patch, pattern, peach, pear, pelican, pencil box, pepper, performer, petri dish, piano, pickle, picnic table, pig, pill
    bottle, pine tree, pipe, pitch, plaid shirt, plank, plate rack, player, playpen, podium, police car, policemen, pond, pool,
    porch, poster, potted plant, prairie, printer, projector, protest, puddle, pumpkin, puzzle, quill, race car, rack, radio, rail,
    rain, rainforest, rapeseed, red panda, red-breasted merganser, referee, rein, resort, revolver, rice, rifle, rink, robin, rock
    cliff, rock wall, rod, rollerblader, rooster, rotisserie, rubber eraser, rugby ball, runner, safe, sailboard, salt shaker,
    sand, sandwich, sausage, scabbard, schipperke, scooter, scottish deerhound, scuba diver, sea cucumber, sea urchin, seashore,
    semi truck, shark, sheet cake, shetland sheepdog, shirt, shop, shoreline, shower cap, siamese cat, sideline, silhouette, sink,
    skateboard ramp, ski, ski pole, skis, skyline, sled dog, slide, slope, smart phone, snack, sneakers, snow slope, snowboarder,
    snowsuit, snowy slope, soccer field, socks, softball, soldier, sorrel, space heater, spaniel, spectators, spider web, spoon,
    sports car, spout, square, staffordshire bullterrier, stairs, standard schnauzer, statue, steel drum, sticker, stomach, stop
    light, store, strainer, strawberry, street light, stretcher, structure, stuffed animal, stupa, subway car, suitcase, sun,
    sunlight, sunshade, surfboard, sussex spaniel, sweater, swimming pool, switch, tabby cat, tablet, tailed frog, tarantula,
    tattoo, team, teddy bear, telephone, tench, tennis match, tent, terrier, thimble, thumb, tick, tiger beetle, tights, timber
    wolf, toast, toe, toilet tissue, toothpaste, toucan, tow truck, toy, toyshop, traffic cone, trailer, train engine, train yard,
    transit bus, travel, tree branch, trench coat, trilobite, trolley, trousers, tub, turkey, tutu, typewriter keyboard, unicycle,
    utensil, vase, veggies, vendor, video camera, vine snake, volleyball, waist, walker hound, wall clock, wardrobe, washer, water
    bottle, water jug, water tower, waterskier, weasel, weevil, wetsuit, wheelbarrow, whippet, white stork, wii remote, wind chime,
    window shade, wine, wire, wolf, wood, woodland, worm fence, wristwatch, yorkshire terrier, zombie
    """.split(",")
)
