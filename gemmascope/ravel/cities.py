"""Well-known cities with their country, continent and language, and prompts that ask for them, in our own words.

They serve offline, where the benchmark's own lists are not at hand (`data.read_ravel`). Countries are the names that
texts mostly use, the language is the one that most people of the city speak.
"""

from .data import EntityData

# country | continent | language | cities
_TABLE = """
Afghanistan|Asia|Dari|Kabul
Algeria|Africa|Arabic|Algiers
Argentina|South America|Spanish|Buenos Aires, Rosario, Mendoza
Australia|Australia|English|Sydney, Melbourne, Brisbane, Perth, Adelaide, Canberra
Austria|Europe|German|Vienna, Salzburg, Graz
Bangladesh|Asia|Bengali|Dhaka
Belgium|Europe|Dutch|Antwerp, Ghent, Bruges
Brazil|South America|Portuguese|Brasilia, Salvador, Recife, Curitiba, Fortaleza
Bulgaria|Europe|Bulgarian|Sofia, Varna
Canada|North America|English|Toronto, Vancouver, Ottawa, Calgary, Edmonton, Winnipeg, Halifax
Chile|South America|Spanish|Santiago, Valparaiso
China|Asia|Chinese|Beijing, Shanghai, Guangzhou, Shenzhen, Wuhan, Chengdu, Nanjing, Tianjin, Harbin
Colombia|South America|Spanish|Bogota, Medellin, Cali
Croatia|Europe|Croatian|Zagreb, Split, Dubrovnik
Cuba|North America|Spanish|Havana
Denmark|Europe|Danish|Copenhagen, Aarhus, Odense
Ecuador|South America|Spanish|Quito, Guayaquil
Egypt|Africa|Arabic|Cairo, Alexandria, Luxor
England|Europe|English|London, Manchester, Liverpool, Leeds, Bristol, Oxford
Ethiopia|Africa|Amharic|Addis Ababa
Finland|Europe|Finnish|Helsinki, Tampere, Turku
France|Europe|French|Paris, Lyon, Marseille, Toulouse, Bordeaux, Lille, Nantes, Strasbourg
Germany|Europe|German|Berlin, Munich, Hamburg, Frankfurt, Cologne, Dresden, Leipzig, Stuttgart
Ghana|Africa|English|Accra, Kumasi
Greece|Europe|Greek|Athens, Thessaloniki
Hungary|Europe|Hungarian|Budapest, Debrecen
India|Asia|Hindi|Mumbai, Delhi, Jaipur, Lucknow, Varanasi, Agra
Indonesia|Asia|Indonesian|Jakarta, Bandung, Surabaya
Iran|Asia|Persian|Tehran, Isfahan, Shiraz, Tabriz
Iraq|Asia|Arabic|Baghdad, Basra, Mosul
Ireland|Europe|English|Dublin, Cork, Galway, Limerick
Israel|Asia|Hebrew|Haifa, Tel Aviv
Italy|Europe|Italian|Rome, Milan, Naples, Turin, Venice, Florence, Bologna, Palermo
Japan|Asia|Japanese|Tokyo, Osaka, Kyoto, Hiroshima, Nagoya, Sapporo, Yokohama
Kenya|Africa|Swahili|Nairobi, Mombasa
Lebanon|Asia|Arabic|Beirut
Malaysia|Asia|Malay|Kuala Lumpur
Mexico|North America|Spanish|Guadalajara, Monterrey, Tijuana, Cancun
Morocco|Africa|Arabic|Casablanca, Rabat, Marrakesh
Nepal|Asia|Nepali|Kathmandu
Netherlands|Europe|Dutch|Amsterdam, Rotterdam, Utrecht, Eindhoven
Nigeria|Africa|English|Lagos, Abuja, Ibadan
Norway|Europe|Norwegian|Oslo, Bergen, Trondheim
Pakistan|Asia|Urdu|Karachi, Lahore, Islamabad
Peru|South America|Spanish|Lima, Cusco, Arequipa
Philippines|Asia|Filipino|Manila, Cebu
Poland|Europe|Polish|Warsaw, Krakow, Gdansk, Wroclaw
Portugal|Europe|Portuguese|Lisbon, Porto, Coimbra
Romania|Europe|Romanian|Bucharest, Cluj
Russia|Europe|Russian|Moscow, Kazan, Samara, Volgograd
Scotland|Europe|English|Edinburgh, Glasgow, Aberdeen, Dundee
Senegal|Africa|French|Dakar
Spain|Europe|Spanish|Madrid, Barcelona, Valencia, Seville, Bilbao, Malaga
Sweden|Europe|Swedish|Stockholm, Gothenburg, Uppsala
Switzerland|Europe|German|Zurich, Basel, Bern
Syria|Asia|Arabic|Damascus, Aleppo, Homs
Thailand|Asia|Thai|Bangkok, Phuket
Tunisia|Africa|Arabic|Tunis
Turkey|Asia|Turkish|Ankara, Izmir, Bursa, Antalya
Ukraine|Europe|Ukrainian|Kyiv, Odessa, Kharkiv, Lviv
Venezuela|South America|Spanish|Caracas, Maracaibo
Vietnam|Asia|Vietnamese|Hanoi, Saigon, Hue
"""

# The examples of a prompt are no entities of the table. The last template of each attribute is for testing.
_TEMPLATES = {
    "country": (
        "Reykjavik is a city in the country of Iceland. Doha is a city in the country of Qatar. "
        "%s is a city in the country of",
        "Reykjavik lies in Iceland. Doha lies in Qatar. Vilnius lies in Lithuania. %s lies in",
        "City: Reykjavik. Country: Iceland. City: Doha. Country: Qatar. City: Vilnius. Country: Lithuania. "
        "City: %s. Country:",
        "Flights to Reykjavik land in Iceland. Flights to Doha land in Qatar. Flights to %s land in",
    ),
    "continent": (
        "Reykjavik is a city on the continent of Europe. Doha is a city on the continent of Asia. Kigali is a city on "
        "the continent of Africa. %s is a city on the continent of",
        "City: Reykjavik. Continent: Europe. City: Doha. Continent: Asia. City: Panama City. Continent: North America. "
        "City: Kigali. Continent: Africa. City: %s. Continent:",
        "Reykjavik belongs to the continent Europe, Doha belongs to the continent Asia, Kigali belongs to the "
        "continent Africa, and %s belongs to the continent",
        "The continent around Reykjavik is Europe. The continent around Doha is Asia. The continent around Kigali is "
        "Africa. The continent around %s is",
    ),
    "language": (
        "People in Reykjavik speak Icelandic. People in Vilnius speak Lithuanian. People in %s speak",
        "City: Reykjavik. Language: Icelandic. City: Vilnius. Language: Lithuanian. City: %s. Language:",
        "The language of Reykjavik is Icelandic. The language of Vilnius is Lithuanian. The language of %s is",
        "Schools in Reykjavik teach in Icelandic. Schools in Vilnius teach in Lithuanian. Schools in %s teach in",
    ),
}


def cities() -> EntityData:
    """The cities of this file. Every third of them in the order of their names is for testing, as the last template of
    each attribute is; the others are for training."""
    labels: dict[str, dict[str, str]] = {attribute: {} for attribute in _TEMPLATES}
    for line in _TABLE.strip().splitlines():
        country, continent, language, names = line.split("|")
        for name in names.split(", "):
            for attribute, label in zip(_TEMPLATES, (country, continent, language), strict=True):
                labels[attribute][name] = label
    names = sorted(labels["country"])
    return EntityData(
        "city",
        labels,
        _TEMPLATES,
        {name: "test" if number % 3 == 2 else "train" for number, name in enumerate(names)},
        {
            template: "test" if template == templates[-1] else "train"
            for templates in _TEMPLATES.values()
            for template in templates
        },
    )
