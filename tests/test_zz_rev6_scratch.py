import json, subprocess, sys
sys.setrecursionlimit(20000)
import psycopg, pytest
from tests.command_line import CommandLine, slot_name
from tests.live_service import ANYBODY, live_service
from tests.phoenix import phoenix
from walstream.testing.databases import create_database, drop_database

VALUES = {
 "json": ['"\\ud800"', "["*5000+"]"*5000, '{"a":'*3000+"1"+"}"*3000, "1e400", "123456789012345678901234567890123456789.5e5"],
 "jsonb": ["["*5000+"]"*5000],
 "json[]": ['{"'+"["*3000+"]"*3000+'"}'],
 "pj": ['("'+"["*3000+"]"*3000+'")', '("""\\ud800""")'],
 "text": ["x"*1500000, "\u2028\u2029\ufeff\uffff\U0010ffff\x01\x7f"],
 "int[]": ["{"+",".join(["1"]*100000)+"}"],
}
def test_weird(server_dsn, database_template, tmp_path):
    with create_database(server_dsn, database_template) as db:
        db.execute("CREATE TYPE pj AS (j json); CREATE TYPE mood AS ENUM ('sad','ok'); CREATE TYPE pair AS (a int, b text); CREATE DOMAIN dom AS int; CREATE DOMAIN domarr AS int[]; CREATE DOMAIN domnan AS numeric; CREATE DOMAIN domts AS timestamp")
        n=0
        with live_service(CommandLine(tmp_path), db.dsn, slot_name(), more=ANYBODY+'[realtime]\nenabled=true\n') as s, phoenix(s.url,"") as c, psycopg.connect(db.dsn,autocommit=True) as w:
            w.execute("CREATE TABLE first (id int)"); c.join("w",[{"event":"*","schema":"public","table":"*","since":None}])
            for i,(t,vs) in enumerate(VALUES.items()):
                k=0
                w.execute(f"CREATE TABLE t{i} (id int primary key, v {t})")
                w.execute(f"ALTER TABLE t{i} REPLICA IDENTITY FULL")
                for j,v in enumerate([*vs,None]):
                    try: w.execute(f"INSERT INTO t{i} VALUES ({j}, %s::{t})",[v])
                    except psycopg.Error as e: print("skip",t,v,str(e)[:60]); continue
                    n+=1; k+=1
                    
                    try: [d]=c.changes(1,3)
                    except TimeoutError: print("LOST",t,str(v)[:30]); k-=1; continue
                    print(t, str(v)[:20], str(d)[:80])
                w.execute(f"UPDATE t{i} SET id=id+100"); w.execute(f"DELETE FROM t{i}")
                try: c.changes(2*k,3)
                except Exception as e: print('ERR',type(e))
            print(n)
    drop_database(server_dsn, db.name)
