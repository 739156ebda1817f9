"""Small surveys as csv text, in the layouts that `load_survey` reads."""

COUNTS = """qkey,attribute,group,question,options,ordinal,counts,n
space,SEX,Female,Space?,"[""More"", ""Same"", ""Less""]","[3, 2, 1]","[5, 3, 2]",10
space,SEX,Male,Space?,"[""More"", ""Same"", ""Less""]","[3, 2, 1]","[1, 3, 2]",6
parks,SEX,Female,Parks?,"[""No"", ""Yes""]",,"[5, 3]",
parks,SEX,Male,Parks?,"[""No"", ""Yes""]",,"[0, 3]",3
"""
LONG = """respondent,question,answer,party,weight
1,tax,yes,red,2
1,guns,no,red,2
2,tax,no,red,1
2,guns,,red,1
3,tax,yes,blue,1
3,guns,yes,blue,1
4,guns,no,blue,3
"""
WIDE = """party,weight,tax,guns
red,2,yes,no
red,1,no,
blue,1,yes,yes
blue,3,,no
"""
SCALES = """respondent,party,weight,tax,guns
1,red,2,yes,1
2,red,1,no,2
3,blue,1,yes,3
4,blue,3,no,1
"""
