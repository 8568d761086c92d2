-- Run once, while the image sets up a new cluster, after 01_role_and_grants.sql has made the role.
\getenv password POSTGRES_PASSWORD
ALTER ROLE walstream PASSWORD :'password';
