import json, subprocess
import psycopg, pytest
from tests.command_line import CommandLine, slot_name
from tests.live_service import ANYBODY, live_service
from tests.phoenix import phoenix
from walstream.testing.databases import create_database, drop_database

VALUES = {
 "timestamp": ["infinity","-infinity","4713-01-01 00:00:00 BC","294276-12-31 23:59:59.999999","0001-01-01"],
 "timestamptz": ["infinity","-infinity","4713-01-02 00:00:00+00 BC","294276-12-31 00:00:00+00"],
 "date": ["infinity","-infinity","4713-01-01 BC","5874897-12-31"],
 "time": ["24:00:00"], "timetz": ["24:00:00-1559"],
 "interval": ["-178000000 years","1 mon -1 day 00:00:01","0"],
 "numeric": ["NaN","Infinity","-Infinity","1e-16383","-0.000"],
 "float8": ["NaN","Infinity","-Infinity","-0","1e308"],
 "float4": ["NaN","1e38"],
 "money": ["-1.5"], "bytea": ["\\x","\\x00ff"], "bit(3)": ["101"], "varbit": [""],
 "int4range": ["empty","[1,5)","(,)"], "int4multirange": ["{}","{[1,2),[3,4)}"],
 "int4[]": ["{}","[2:3]={1,2}","{{1,2},{3,NULL}}"], "text[]": ['{"a\\"b",NULL,"NULL",""}'], "jsonb[]": ['{"{\\"a\\":1}"}'],
 "json": ['{"a":1,"a":2}','"\\u0000"',' [1 ] '], "jsonb": ['{"a":1e400}','1'],
 "xml": ["<a>&lt;</a>"], "uuid": ["00000000-0000-0000-0000-000000000000"], "inet": ["::1/64"], "cidr":["10.0.0.0/8"], "macaddr":["08:00:2b:01:02:03"],
 "point":["(NaN,1)"], "path":["[(0,0),(1,1)]"], "tsvector":["a:1A 'b c':2"], "tsquery":["a&b"], "pg_lsn":["0/0"], "xid8":["18446744073709551615"], "oid":["4294967295"], "regclass":["pg_class"], "name":["n"], '"char"':["a"], "bpchar":["a "],
 "mood":["sad"], "mood[]":["{sad,NULL}"], "pair":["(1,\"a\"\"b\")","(,)"], "pair[]":['{"(1,a)"}'], "dom":["5"], "domarr":["{1}"], "domnan":["NaN"], "domts":["infinity"], "timestamp[]":["{infinity}"], "numeric[]":["{NaN}"], "tsrange":["[infinity,]"],
 "jsonpath":["$.a"], "txid_snapshot":["10:20:10,14"],
}
def test_weird(server_dsn, database_template, tmp_path):
    with create_database(server_dsn, database_template) as db:
        db.execute("CREATE TYPE mood AS ENUM ('sad','ok'); CREATE TYPE pair AS (a int, b text); CREATE DOMAIN dom AS int; CREATE DOMAIN domarr AS int[]; CREATE DOMAIN domnan AS numeric; CREATE DOMAIN domts AS timestamp")
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
                    except TimeoutError: print("LOST",t,v); k-=1; continue
                    print(t, v, json.dumps(d["record"]["v"])[:80])
                w.execute(f"UPDATE t{i} SET id=id+100"); w.execute(f"DELETE FROM t{i}")
                c.changes(2*k)
            print(n)
    drop_database(server_dsn, db.name)
